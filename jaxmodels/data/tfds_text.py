"""Text data sets of TFDS, read without TensorFlow.

    source = tfds_text.open_split("scrolls/qasper", "validation", data_dir="~/tensorflow_datasets")
    source[0]["input"]                # str; lists of texts are lists of str

Preparing one is left to the user, for it downloads; the error names the command.
"""

import os
from typing import Any

import numpy as np

from jaxmodels.data import extras


class TfdsText:
    """Random access to the records of one split; bytes are decoded to text.

    Attributes:
      name: name, config and version, such as "scrolls/qasper/1.0.0".
      split: the split.
      left_out: always 0.
    """

    left_out = 0

    def __init__(self, records: Any, name: str, split: str, facts: dict[str, Any], folder: str):
        """Wraps what `builder.as_data_source` gives; `open_split` calls this."""
        self._records, self.name, self.split = records, name, split
        self._facts, self._folder = facts, folder

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the records, as JSON values."""
        return {"name": self.name, "split": self.split, **self._facts}

    def __len__(self) -> int:
        """Returns the number of records."""
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns record `index`.

        Raises:
          IndexError: there is no such record.
          ValueError: a text of it is not UTF-8.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} in {self.name}")
        return {name: _text(name, value) for name, value in self._records[index].items()}

    def where(self, index: int) -> str:
        """Returns the folder that holds record `index`."""
        del index
        return self._folder

    def __repr__(self) -> str:
        """Returns a short description."""
        return f"TfdsText({self.name}, {self.split}, {len(self)} records)"


def open_split(
    name: str, split: str, *, data_dir: str | os.PathLike[str] | None = None, module: str = ""
) -> TfdsText:
    """Opens a split of a data set that was prepared before.

    Args:
      name: TFDS name, with the config: "scientific_papers/arxiv".
      split: one of its splits, or a slice such as "train[:1%]".
      data_dir: TFDS's folder; None: $TFDS_DATA_DIR, else ~/tensorflow_datasets.
      module: module of the builder, for those that TFDS only knows with TensorFlow installed; it
        goes into the command that the error names.

    Raises:
      ValueError: not prepared there, not as array_record, or no such split.
      ImportError: TFDS is not installed.
    """
    tfds = extras.needed("tensorflow_datasets", f"the data set {name}")
    given = None if data_dir is None else os.fspath(os.path.expanduser(data_dir))
    where = given or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    try:
        builder = tfds.builder(name, data_dir=given)
        available = list(builder.info.splits)
    except ValueError:  # without TensorFlow, TFDS does not know the older builders
        available = []
    if not available:
        raise ValueError(
            f"{name} is not prepared in {where}: {_command(name, data_dir, module)}. It needs "
            "array_record files and, for some sets, TensorFlow or apache_beam while preparing"
        )
    if split.partition("[")[0] not in available:
        raise ValueError(f"{name} has no split {split!r}: use one of {', '.join(available)}")
    try:
        records = builder.as_data_source(split)
    except NotImplementedError as error:
        raise ValueError(
            f"{name} in {where} is stored as {builder.info.file_format.value}: array_record files "
            f"can be read here. Remove it, then {_command(name, data_dir, module)}"
        ) from error
    info = builder.info.splits[split]
    facts = {"records": len(records), "bytes": int(getattr(info, "num_bytes", 0) or 0)}
    return TfdsText(records, builder.info.full_name, split, facts, str(builder.data_path))


def _command(name: str, data_dir: Any, module: str) -> str:
    first = f"import {module}; " if module else ""
    place = "" if data_dir is None else f", data_dir={os.fspath(data_dir)!r}"
    return (
        f'prepare it with python -c "{first}import tensorflow_datasets as tfds; '
        f"tfds.builder({name!r}{place}, file_format='array_record').download_and_prepare()\""
    )


def _text(name: str, value: Any) -> Any:
    """Decodes bytes, also inside arrays; everything else stays as it is."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"field {name!r} holds byte {value[error.start]:#04x} at {error.start}: UTF-8 text "
                "is accepted"
            ) from None
    if isinstance(value, dict):
        return {key: _text(f"{name}.{key}", item) for key, item in value.items()}
    if isinstance(value, list) or (isinstance(value, np.ndarray) and value.dtype.kind in "OS"):
        return [_text(name, item) for item in value]
    return value
