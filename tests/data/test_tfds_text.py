"""TFDS text without TensorFlow: a prepared set is read, anything else is said clearly."""

import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from jaxmodels.data import tfds_text

tfds = pytest.importorskip("tensorflow_datasets")


class TinyTexts(tfds.core.GeneratorBasedBuilder):
    """Three texts, one of them with a list beside it."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> Any:
        text = tfds.features.Text()
        features = {"text": text, "parts": tfds.features.Sequence(text)}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, text in enumerate(("one", "zwölf", "three")):
            yield number, {"text": text, "parts": [text] * number}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    data_dir = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    TinyTexts(data_dir=str(data_dir), file_format="array_record").download_and_prepare()
    return data_dir


def test_a_prepared_set_is_text_by_number(data_dir: pathlib.Path) -> None:
    source = tfds_text.open_split("tiny_texts", "train", data_dir=data_dir)
    assert [source[i]["text"] for i in range(len(source))] == ["one", "zwölf", "three"]
    assert source[2]["parts"] == ["three", "three"] and source[0]["parts"] == []
    assert source.fingerprint["name"] == "tiny_texts/1.0.0"
    assert "tensorflow" not in sys.modules
    with pytest.raises(IndexError, match="record 3 of 3"):
        source[3]
    part = tfds_text.open_split("tiny_texts", "train[1:]", data_dir=data_dir)
    assert len(part) == 2 and part[0]["text"] == "zwölf"
    assert part.fingerprint != source.fingerprint


def test_an_unknown_split_lists_the_known_ones(data_dir: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="no split 'test': use one of train"):
        tfds_text.open_split("tiny_texts", "test", data_dir=data_dir)


def test_what_is_not_prepared_comes_with_the_command(tmp_path: pathlib.Path) -> None:
    # one that TFDS knows without TensorFlow, and one that it hides then
    for name, module in (("multi_news", ""), ("cnn_dailymail", "some.module")):
        with pytest.raises(ValueError, match=f"{name} is not prepared in .*{tmp_path}") as caught:
            tfds_text.open_split(name, "train", data_dir=tmp_path, module=module)
        assert "download_and_prepare()" in str(caught.value)
        assert ("import some.module; " in str(caught.value)) == bool(module)


def test_other_file_formats_are_named(tmp_path: pathlib.Path, monkeypatch: Any) -> None:
    class Stored:
        info = type("Info", (), {"splits": ["train"]})()

        def as_data_source(self, split: str) -> Any:
            raise NotImplementedError

    Stored.info.file_format = type("Format", (), {"value": "tfrecord"})
    monkeypatch.setattr(tfds, "builder", lambda name, data_dir: Stored())
    with pytest.raises(ValueError, match="stored as tfrecord: array_record"):
        tfds_text.open_split("tiny_texts", "train", data_dir=tmp_path)


def test_bytes_that_are_no_text_name_their_field() -> None:
    source = tfds_text.TfdsText([{"text": b"a\xffb"}], "t/1.0.0", "train", {}, "")
    with pytest.raises(ValueError, match="field 'text' holds byte 0xff at 1"):
        source[0]
