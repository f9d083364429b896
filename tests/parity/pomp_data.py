"""Parity of CLIP's tokenizer and image preprocessing, and the data files of POMP."""

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxmodels.data.clip_images import evaluation_transform
from jaxmodels.data.clip_tokenizer import ClipTokenizer, clean_text
from jaxmodels.data.rand_augment import apply_operation

from .fixtures import Case

Computed = dict[str, Any]

_ROOT = Path(__file__).resolve().parents[2]
_SHARED = Path(os.environ.get("JAXMODELS_SHARED", _ROOT.parent / "shared"))
_MERGES = "clip_bpe_merges.npz"
# Ids that are no merges: 256 bytes in two forms, start and end.
_OTHER_IDS = 2 * 256 + 2


def _lines(utf8: np.ndarray) -> list[str]:
    return utf8.tobytes().decode("utf-8").removesuffix("\n").split("\n")


def shared_path(case: Case, name: str) -> Path:
    """A data file beside a case, or else in the shared folder."""
    beside = case.path.resolve().parent / name
    return beside if beside.is_file() else _SHARED / "parity" / case.method / name


def _merges_path(case: Case) -> Path:
    return shared_path(case, _MERGES)


@functools.cache
def _tokenizer(path: Path, vocab_size: int) -> ClipTokenizer:
    with np.load(path, allow_pickle=False) as stored:
        merges = _lines(stored["merges_utf8"])
    return ClipTokenizer(merges[: vocab_size - _OTHER_IDS])


def published_tokenizer(case: Case) -> ClipTokenizer:
    """CLIP's tokenizer with the merges beside a case."""
    path = _merges_path(case)
    with np.load(path, allow_pickle=False) as stored:
        return _tokenizer(path, json.loads(str(stored["meta"]))["vocab_size"])


def _utf8(text: str) -> np.ndarray:
    """Text as an array that is compared exactly."""
    return np.frombuffer(text.encode("utf-8"), np.uint8)


def _padded(ids: list[int], length: int) -> np.ndarray:
    return np.pad(np.asarray(ids, np.int32), (0, length - len(ids)))


def _ids(ids: list[int]) -> np.ndarray:
    return np.asarray(ids, np.int32)


def expected_tokenizer_cases(case: Case) -> Computed:
    """References of kind tokenizer_cases, as arrays by case number and field."""
    expected: Computed = {f"outputs/{name}": case.meta[name] for name in ("sot", "eot")}
    expected["outputs/vocab_size"] = case.meta["vocab_size"]
    for number, one in enumerate(case.meta["cases"]):
        fields = {name: _utf8(one[name]) for name in ("cleaned", "decoded")}
        fields["ids"] = _ids(one["ids"])
        fields["eot_position"] = one["eot_position"]
        fields["error"] = _utf8(one["error"] or "")
        for name in ("row", "row_truncated"):
            if one[name] is not None:
                fields[name] = _padded(one[name], one["context_length"])
        expected |= {f"outputs/{number}/{name}": value for name, value in fields.items()}
    return {name: np.asarray(value) for name, value in expected.items()}


def tokenizer_cases(case: Case) -> Computed:
    """Kind tokenizer_cases."""
    tokenizer = _tokenizer(_merges_path(case), case.meta["vocab_size"])
    computed: Computed = {
        "outputs/sot": tokenizer.start_id,
        "outputs/eot": tokenizer.end_id,
        "outputs/vocab_size": tokenizer.vocab_size,
    }
    for number, one in enumerate(case.meta["cases"]):
        text, length = one["text"], one["context_length"]
        truncated = tokenizer(text, length, truncate=True)[0]
        fields = {
            "cleaned": _utf8(clean_text(text)),
            "ids": _ids(tokenizer.encode(text)),
            "decoded": _utf8(tokenizer.decode(one["ids"])),
            "row_truncated": truncated,
            # Where the original reads the text tower: the first of the highest ids.
            "eot_position": np.argmax(truncated),
        }
        try:
            fields |= {"row": tokenizer(text, length)[0], "error": _utf8("")}
        except ValueError as error:
            kind = "too_long" if "do not fit" in str(error) else str(error)
            fields["error"] = _utf8(kind)
        computed |= {f"outputs/{number}/{name}": value for name, value in fields.items()}
    return computed


def preprocess(case: Case) -> Computed:
    """Kind preprocess: the evaluation transform of each image, each operation on one image."""
    meta, computed = case.meta, {}
    for name, pixels in case.inputs.items():
        if name.startswith("image"):
            found = evaluation_transform(pixels, meta["size"], meta["mean"], meta["std"])
            number = name.removeprefix("image")
            computed[f"outputs/tensor{number}"] = np.transpose(found, (2, 0, 1))
    for name, strength, value in meta.get("ops", ()):
        image = Image.fromarray(case.inputs["aug_image"])
        computed[f"outputs/aug/{name}/{strength}"] = np.asarray(apply_operation(image, name, value))
    return computed


def clip_bpe_merges(case: Case) -> None:
    """Kind clip_bpe_merges: the vocabulary that the merges give."""
    tokenizer = _tokenizer(case.path.resolve(), case.meta["vocab_size"])
    found = (tokenizer.vocab_size, tokenizer.start_id, tokenizer.end_id)
    wanted = tuple(case.meta[name] for name in ("vocab_size", "sot", "eot"))
    if found != wanted:
        raise ValueError(f"vocabulary size, start and end are {found}, not {wanted}")


def in21k_class_names(case: Case) -> None:
    """Kind in21k_class_names: every name becomes ids that decode to the name."""
    with np.load(case.path, allow_pickle=False) as stored:
        names, synsets = _lines(stored["names_utf8"]), _lines(stored["synsets_utf8"])
    if len(names) != len(synsets):
        raise ValueError(f"{len(names)} names have {len(synsets)} synsets")
    _check_texts(case, [name.replace("_", " ") for name in names])


def data_lists(case: Case) -> None:
    """Kind data_lists: every name and every filled template becomes ids."""
    lists = {name: value for name, value in case.meta.items() if name not in ("kind", "about")}
    _check_texts(case, [text.replace("{}", "dog") for text in _strings(lists)])


def coco_pomp_class_vectors(case: Case) -> None:
    """Kind coco_pomp_class_vectors: its names; only CLIP's own weights give the vectors."""
    names, vectors = case.meta["classnames"], case.expected["outputs/class_vectors"]
    if len(names) != len(vectors) or not np.isfinite(vectors).all():
        raise ValueError(f"{len(names)} names have vectors of shape {vectors.shape}")
    _check_texts(case, names)


def _strings(value: Any) -> Iterator[str]:
    """All strings in nested lists and dictionaries, keys excepted."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _check_texts(case: Case, texts: list[str]) -> None:
    """Tokenises the texts, which must not be cut and must come back from their ids."""
    tokenizer = published_tokenizer(case)
    for text, row in zip(texts, tokenizer(texts, allow_special=False), strict=True):
        end = np.argmax(row)
        decoded = tokenizer.decode(row[1:end])
        if end < 2 or decoded.replace(" ", "") != clean_text(text).replace(" ", ""):
            raise ValueError(f"{text!r} became {row[: end + 1].tolist()}, which is {decoded!r}")
