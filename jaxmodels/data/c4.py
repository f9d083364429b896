"""C4, cleaned English web text, as TFDS prepares it (`c4/en`); read without TensorFlow."""

import os
from typing import Any

from jaxmodels.data import extras

NAME = "c4/en"


class C4Documents:
    """Random access to documents: `{"text": bytes, ...}`.

    Attributes:
      fingerprint: what identifies the records, as JSON values.
    """

    def __init__(self, records: Any, fingerprint: dict[str, Any]):
        """Wraps records; `load` calls this."""
        self._records, self.fingerprint = records, fingerprint

    def __len__(self) -> int:
        """Returns the number of documents."""
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns document `index`."""
        return {"text": self._records[index]["text"]}

    def __repr__(self) -> str:
        """Returns a short description."""
        return f"C4Documents({len(self)} documents)"


def load(data_dir: str | os.PathLike[str], split: str) -> C4Documents:
    """Opens a prepared split.

    Args:
      data_dir: TFDS's folder, which holds `c4/en/<version>` as array_record files.
      split: "train" or "validation".

    Raises:
      ImportError: tensorflow-datasets is missing.
      ValueError: the data set is not prepared there.
    """
    tfds = extras.needed("tensorflow_datasets", "data.name=c4")
    try:
        records = tfds.data_source(NAME, split=split, data_dir=str(data_dir), download=False)
        version = str(tfds.builder(NAME, data_dir=str(data_dir)).version)
    except Exception as error:  # TFDS raises many kinds, each for its own missing file
        reason = str(error).split("\n")[0][:200]
        raise ValueError(
            f"{NAME} ({split}) is not prepared in {data_dir}: {reason}. Prepare it once with "
            f"tfds build {NAME} --data_dir={data_dir} --file_format=array_record, and name the "
            "folder by --config.data.dir."
        ) from error
    identity = {"name": NAME, "version": version, "split": split, "records": len(records)}
    return C4Documents(records, identity)
