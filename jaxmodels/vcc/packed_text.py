"""Local text as packed examples: documents with sentence marks, long enough for one sequence."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.data import cache_folder

EOS = "</s>"
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class PackedText:
    """Consecutive documents joined until they hold enough words for one sequence.

    A record is {"text"}: sentences joined by `</s>`, documents by `</s></s>`, the form that
    `masked_lm_example` cuts segments from. The documents' own `</s>` count as such marks.
    """

    def __init__(
        self,
        documents: Any,
        words: int,
        *,
        mark_sentences: bool = True,
        data_dir: str | os.PathLike[str] | None = None,
    ):
        """Groups documents.

        Args:
          documents: random access to {"text": str}, such as `text_lines.TextDocuments`.
          words: a record holds at least so many words (the last one may hold fewer).
          mark_sentences: put `</s>` between sentences; False: between documents alone, as T5's
            pre-training has it.
          data_dir: folder of prepared data, where the groups are kept; None: every opening reads
            all documents once.
        """
        self.documents, self.words, self.mark_sentences = documents, words, mark_sentences
        self._starts = self._groups() if data_dir is None else self._kept_groups(Path(data_dir))

    def _groups(self) -> np.ndarray:
        """The first document of every record, and the number of documents."""
        starts, held = [0], 0
        for i in range(len(self.documents)):
            if held >= self.words:
                starts.append(i)
                held = 0
            held += len(self.documents[i]["text"].split())
        if len(starts) > 1 and held < self.words // 2:
            starts.pop()  # too short for a record of its own: it joins the one before
        return np.asarray([*starts, len(self.documents)])

    def _kept_groups(self, data_dir: Path) -> np.ndarray:
        folder = data_dir / "packed_text" / cache_folder.digest(self.fingerprint)[:16]

        def build(work: Path) -> dict[str, Any]:
            np.save(work / "starts.npy", self._groups())
            return {}

        message = f"packing {self.documents!r} in {folder}"
        cache_folder.ensure(folder, self.fingerprint, build, message)
        return np.load(folder / "starts.npy")

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the records, as JSON values."""
        marks = {} if self.mark_sentences else {"mark_sentences": False}
        return dict(self.documents.fingerprint) | {"packed_words": self.words} | marks

    def __len__(self) -> int:
        """Returns the number of records."""
        return len(self._starts) - 1

    @property
    def left_out(self) -> int:
        """Bad documents that `documents` left out."""
        return self.documents.left_out

    def where(self, index: int) -> str:
        """Returns file and line where record `index` starts."""
        return self.documents.where(int(self._starts[index]))

    def __getitem__(self, index: int) -> dict[str, str]:
        """Returns record `index`."""
        first, last = self._starts[index : index + 2].tolist()
        texts = (self.documents[i]["text"] for i in range(first, last))
        if self.mark_sentences:
            texts = (EOS.join(_SENTENCE_END.split(text.strip())) for text in texts)
        return {"text": (EOS + EOS).join(texts)}

    def __repr__(self) -> str:
        """Returns a short description."""
        return f"PackedText({self.documents!r}, {len(self)} records)"
