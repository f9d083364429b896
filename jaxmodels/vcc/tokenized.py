"""What transforms of text share: the tokenizer is opened in the worker that uses it."""

import abc
from typing import Any

from jaxmodels.data import cache_folder


class Tokenized(abc.ABC):
    """A transform that travels to workers without its tokenizer, and names what decides it.

    A subclass says in `open_tokenizer` how the tokenizer is read.
    """

    def __init__(self, tokenizer_path: str, **decides: Any) -> None:
        """Keeps the path; the tokenizer is opened on first use, in the worker itself.

        Args:
          tokenizer_path: the tokenizer.json.
          **decides: JSON values that decide the examples, for the fingerprint.
        """
        self.tokenizer_path = tokenizer_path
        self._decides = decides
        self._tokenizer: Any = None

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides the examples, as JSON values."""
        return self._decides | {"tokenizer_sha256": cache_folder.sha256(self.tokenizer_path)}

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the opened tokenizer behind."""
        return self.__dict__ | {"_tokenizer": None}

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, with the tokens that the transform adds.

        Raises:
          ValueError: it cannot be used.
        """
        if self._tokenizer is None:
            self._tokenizer = self.open_tokenizer()
        return self._tokenizer

    @abc.abstractmethod
    def open_tokenizer(self) -> Any:
        """Returns the tokenizer read from `tokenizer_path`."""
