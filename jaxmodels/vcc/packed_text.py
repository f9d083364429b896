"""Local text as packed examples: documents with sentence marks, long enough for one sequence."""

import re
from typing import Any

import numpy as np

EOS = "</s>"
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class PackedText:
    """Consecutive documents joined until they hold enough words for one sequence.

    A record is {"text"}: sentences joined by `</s>`, documents by `</s></s>`, the form that
    `masked_lm_example` cuts segments from.
    """

    def __init__(self, documents: Any, words: int):
        """Groups documents.

        Args:
          documents: random access to {"text": str}, such as `text_lines.TextDocuments`.
          words: a record holds at least so many words (the last one may hold fewer).
        """
        self.documents, self.words = documents, words
        starts, held = [0], 0
        for i in range(len(documents)):
            if held >= words:
                starts.append(i)
                held = 0
            held += len(documents[i]["text"].split())
        if len(starts) > 1 and held < words // 2:
            starts.pop()  # too short for a record of its own: it joins the one before
        self._starts = np.asarray([*starts, len(documents)])

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the records, as JSON values."""
        return dict(self.documents.fingerprint) | {"packed_words": self.words}

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
        packed = (EOS.join(_SENTENCE_END.split(text.strip())) for text in texts)
        return {"text": (EOS + EOS).join(packed)}

    def __repr__(self) -> str:
        """Returns a short description."""
        return f"PackedText({self.documents!r}, {len(self)} records)"
