"""Where the records of each fine-tuning data set come from: TFDS, or the user's published files.

`open_split("qasper", "train", path="scrolls/", data_dir=...)` finds the files under `path`,
unpacked or in the archive they are published in; without `path`, TFDS's prepared copy is read.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxmodels.data import cache_folder, json_records, tfds_text

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Origin of one data set.

    Attributes:
      files: for each split with answers, the file that `path` must hold, as published.
      archive: the zip archive that holds them, and the folder inside.
      origin: where to get the files.
      kind: "lines" (an object a line), "articles" (the same, several questions each), "list" (one
        list), "media_sum", or "pairs" (two files of lines).
      tfds: name in TFDS; empty where it has none.
      module: module of the TFDS builder, where TFDS hides it without TensorFlow.
      tfds_splits: TFDS's names of the splits, where they differ.
    """

    files: dict[str, str]
    archive: tuple[str, str]
    origin: str
    kind: str = "lines"
    tfds: str = ""
    module: str = ""
    tfds_splits: tuple[tuple[str, str], ...] = ()


def _scrolls(name: str) -> DataSet:
    return DataSet(
        # The test splits are published without answers.
        files={split: f"{split}.jsonl" for split in ("train", "validation")},
        archive=(f"{name}.zip", name),
        origin=f"https://huggingface.co/datasets/tau/scrolls ({name}.zip)",
        tfds=f"scrolls/{name}",
        module="tensorflow_datasets.text.scrolls.scrolls",
    )


def _papers(name: str) -> DataSet:
    return DataSet(
        files={"train": "train.txt", "validation": "val.txt", "test": "test.txt"},
        archive=(f"{name}-dataset.zip", f"{name}-dataset"),
        origin="https://github.com/armancohan/long-summarization",
        tfds=f"scientific_papers/{name}",
    )


_LINES = {split: f"{split}.jsonl" for split in SPLITS}

DATASETS: dict[str, DataSet] = {
    "hotpotqa": DataSet(
        files={"train": "hotpot_train_v1.1.json", "validation": "hotpot_dev_distractor_v1.json"},
        archive=("", ""),
        origin="https://hotpotqa.github.io",
        kind="list",
    ),
    "wikihop": DataSet(
        files={"train": "train.json", "validation": "dev.json"},
        archive=("qangaroo_v1.1.zip", "qangaroo_v1.1/wikihop"),
        origin="http://qangaroo.cs.ucl.ac.uk (qangaroo_v1.1.zip)",
        kind="list",
    ),
    **{
        name: _scrolls(name)
        for name in (
            *("quality", "qasper", "narrative_qa", "contract_nli"),
            *("qmsum", "gov_report", "summ_screen_fd"),
        )
    },
    # Articles with questions, for choosing among options; `quality` above is their SCROLLS form.
    "quality_articles": DataSet(
        files={
            "train": "QuALITY.v1.0.1.htmlstripped.train",
            "validation": "QuALITY.v1.0.1.htmlstripped.dev",
        },
        archive=("QuALITY.v1.0.1.zip", ""),
        origin="https://github.com/nyu-mll/quality (data/v1.0.1)",
        kind="articles",
    ),
    "cnn_dailymail": DataSet(
        files=_LINES,
        archive=("", ""),
        origin="TFDS (cnn_dailymail), or write version 3.0.0 as lines with article and highlights",
        tfds="cnn_dailymail",
        module="tensorflow_datasets.summarization.cnn_dailymail",
    ),
    "media_sum": DataSet(
        files=dict.fromkeys(SPLITS, "news_dialogue.json"),
        archive=("", ""),
        origin="https://github.com/zcgzcgzcg1/MediaSum (with train_val_test_split.json beside it)",
        kind="media_sum",
        tfds="media_sum",
        tfds_splits=(("validation", "val"),),
    ),
    "multi_news": DataSet(
        files={
            split: f"{short}.src.cleaned"
            for split, short in zip(SPLITS, ("train", "val", "test"), strict=True)
        },
        archive=("", ""),
        origin="https://huggingface.co/datasets/alexfabbri/multi_news (data/*.src.cleaned, *.tgt)",
        kind="pairs",
        tfds="multi_news",
    ),
    "arxiv": _papers("arxiv"),
    "pubmed": _papers("pubmed"),
    "big_patent": DataSet(
        files=_LINES,
        archive=("", ""),
        origin="TFDS (big_patent/all), or write it as lines with description and abstract",
        tfds="big_patent/all",
    ),
}


class QuestionRecords:
    """One record a question, of articles that have several (`article`, `questions`).

    A record is the question's own fields beside `article`.
    """

    left_out = 0

    def __init__(self, articles: Any) -> None:
        """Counts the questions; an article that is bad becomes one bad record."""
        self.articles = articles
        self._places = [
            (row, number)
            for row in range(len(articles))
            for number in range(_question_count(articles, row))
        ]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the records, as JSON values."""
        return dict(self.articles.fingerprint) | {"questions": len(self)}

    def __len__(self) -> int:
        """Returns the number of questions."""
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns question `index`.

        Raises:
          ValueError: its article cannot be read, or its field `questions` is wrong.
        """
        row, number = self._places[index]
        article = self.articles[row]
        questions = article.get("questions")
        asked = questions[number : number + 1] if isinstance(questions, list) else []
        if not asked or not isinstance(asked[0], dict):
            raise ValueError("field 'questions': a list of objects is accepted")
        return asked[0] | {"article": article.get("article")}

    def where(self, index: int) -> str:
        """Returns file and line of the article of question `index`."""
        return self.articles.where(self._places[index][0])

    def __repr__(self) -> str:
        """Returns a short description."""
        return f"QuestionRecords({self.articles!r}, {len(self)} questions)"


def _question_count(articles: Any, row: int) -> int:
    try:
        return max(len(articles[row]["questions"]), 1)
    except (ValueError, TypeError, LookupError):
        return 1


def open_split(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike[str],
    path: str | os.PathLike[str] | None = None,
    tfds_dir: str | os.PathLike[str] | None = None,
) -> Any:
    """Opens a split of a data set, as random access to its records.

    Args:
      name: a key of `DATASETS`.
      split: "train", "validation" or, where its answers are published, "test".
      data_dir: folder of prepared data, for files that cannot be read in place.
      path: folder of the published files, their zip archive, or the one file itself.
      tfds_dir: TFDS's folder, used without `path`; None: TFDS's own default.

    Raises:
      ValueError: no such data set or split; files that are not there (says which, and where to
        get them); a TFDS copy that is not prepared.
    """
    if name not in DATASETS:
        raise ValueError(f"data set {name!r}: use one of {', '.join(DATASETS)}")
    known = DATASETS[name]
    if split not in known.files:
        raise ValueError(
            f"{name} has no split {split!r} with answers: use {' or '.join(known.files)}"
        )
    if path is not None:
        return _from_files(name, split, Path(path).expanduser(), Path(data_dir))
    if not known.tfds:
        raise ValueError(
            f"{name} is read from its published files: set data.path to the folder that holds "
            f"{known.files[split]}. Get it from {known.origin}"
        )
    try:
        tfds_split = dict(known.tfds_splits).get(split, split)
        return tfds_text.open_split(known.tfds, tfds_split, data_dir=tfds_dir, module=known.module)
    except ValueError as error:
        raise ValueError(
            f"{error}. Or set data.path to the folder that holds {known.files[split]}, from "
            f"{known.origin}"
        ) from error


def _from_files(name: str, split: str, path: Path, data_dir: Path) -> Any:
    known = DATASETS[name]
    file = _find(name, split, path)
    if known.kind in ("lines", "articles"):
        archive, _, member = file.partition("::")
        lines = (
            json_records.open_member(archive, member, data_dir=data_dir)
            if member
            else json_records.JsonLines([file])
        )
        return QuestionRecords(lines) if known.kind == "articles" else lines
    if known.kind == "list":
        return json_records.open_array(file, data_dir=data_dir)
    if known.kind == "pairs":
        return _pairs(Path(file), data_dir)
    ids = _media_sum_ids(Path(file).with_name("train_val_test_split.json"), split)
    kept = f"{split} {hashlib.sha256(' '.join(sorted(ids)).encode()).hexdigest()}"
    return json_records.open_array(
        file, data_dir=data_dir, keep=lambda record: record.get("id") in ids, kept=kept
    )


def _find(name: str, split: str, path: Path) -> str:
    """Returns the file of a split under `path`, or "archive::member".

    Raises:
      ValueError: it is not there.
    """
    known = DATASETS[name]
    wanted = known.files[split]
    archive, inside = known.archive
    if path.is_file() and path.suffix != ".zip":
        return str(path)
    folders = (path, path / name, *((path / inside,) if inside else ()))
    for folder in folders:
        if (folder / wanted).is_file():
            return str(folder / wanted)
    zipped = path if path.suffix == ".zip" else path / archive
    if archive and zipped.is_file():
        return f"{zipped}::{inside}/{wanted}" if inside else f"{zipped}::{wanted}"
    also = f" (or {archive})" if archive else ""
    raise ValueError(
        f"{name}, {split}: no {wanted}{also} in {path}. Get it from {known.origin}, and set "
        "data.path to its folder"
    )


def _media_sum_ids(path: Path, split: str) -> set[str]:
    try:
        splits = json.loads(path.read_text("utf-8"))
        return set(splits["val" if split == "validation" else split])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"media_sum needs {path}, with the ids of train, val and test "
            f"({type(error).__name__}: {error}). Get it from {DATASETS['media_sum'].origin}"
        ) from error


def _pairs(source: Path, data_dir: Path) -> json_records.JsonLines:
    """Multi-News: a document a line, with its line breaks written out, and a summary a line."""
    target = source.with_name(source.name.partition(".")[0] + ".tgt")
    if not target.is_file():
        raise ValueError(
            f"{target}, the summaries of {source.name}, is missing. Get it from "
            f"{DATASETS['multi_news'].origin}"
        )
    settings = {file.suffix: cache_folder.sha256(file) for file in (source, target)}
    folder = data_dir / "json_records" / cache_folder.digest(settings)[:16]

    def build(work: Path) -> dict[str, Any]:
        with open(work / "records.jsonl", "w", encoding="utf-8") as out:
            out.writelines(_paired_lines(source, target))
        return {}

    cache_folder.ensure(folder, settings, build, f"preparing {source} in {folder}")
    return json_records.JsonLines([folder / "records.jsonl"], str(source))


def _paired_lines(source: Path, target: Path) -> Iterator[str]:
    with open(source, encoding="utf-8") as documents, open(target, encoding="utf-8") as summaries:
        try:
            for document, summary in zip(documents, summaries, strict=True):
                record = {
                    "document": document.strip().replace("NEWLINE_CHAR", "\n"),
                    "summary": summary.strip(),
                }
                yield json.dumps(record) + "\n"
        except ValueError as error:
            raise ValueError(
                f"{source} and {target} do not hold as many lines of UTF-8 text: {error}"
            ) from error
