"""CLIP's tokenizer: published CLIP weights know text only by the ids that exactly this one gives.

    tokenizer = clip_tokenizer.load("bpe_simple_vocab_16e6.txt.gz")
    tokens = tokenizer(["a photo of a dog.", "a photo of a cat."])  # int32 [2, 77]

Text is cleaned and lower-cased, split into pieces, and each piece is merged on its own: its UTF-8
bytes are written as printable symbols, the last with `</w>` behind it, and pairs of neighbours
become one symbol in the order of the list of merges.
"""

import gzip
import heapq
import html
import os
import re
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from jaxmodels.data import extras

CONTEXT_LENGTH = 77
START_OF_TEXT, END_OF_TEXT = "<|startoftext|>", "<|endoftext|>"
# Published vocabularies: 2 * 256 byte symbols, this many merges and two special tokens: 49,408.
NUM_MERGES = 48_894
_END_OF_WORD = "</w>"
# Of OpenAI's file, which lists more merges than are used, 3.2 MB are text.
_LARGEST_FILE = 2**24
# Special tokens, English contractions, words, single digits, runs of anything else but space.
_PIECES = (
    rf"{re.escape(START_OF_TEXT)}|{re.escape(END_OF_TEXT)}"
    r"|'(?:s|t|re|ve|m|ll|d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
)
_PURPOSE = "CLIP's tokenizer"
_WHERE = (
    "Use bpe_simple_vocab_16e6.txt.gz of OpenAI's CLIP repository, or the merges.txt beside a CLIP "
    "checkpoint in Hugging Face's format"
)


def byte_symbols() -> dict[int, str]:
    """Returns `{byte: its one-character symbol}`, in the order of the ids.

    The 188 bytes that Latin-1 prints stand for themselves and come first; the others take the code
    points from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + place) for place, byte in enumerate(others)
    }


def clean_text(text: str) -> str:
    """Returns the text as it is split: repaired by ftfy, HTML decoded, lower case, single spaces.

    Raises:
      ImportError: ftfy or regex is not installed.
    """
    ftfy, regex = extras.needed("ftfy", _PURPOSE), extras.needed("regex", _PURPOSE)
    # ftfy is slow, and has nothing to do on plain text.
    if not (text.isascii() and text.isprintable()) or "&" in text:
        # Twice, since web text is often escaped twice: "&amp;amp;".
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return regex.sub(r"\s+", " ", text.strip()).strip().lower()


class ClipTokenizer:
    """Text to token ids and back.

    Attributes:
      vocab_size: number of ids; 49,408 with the published merges.
      start_id, end_id: of the special tokens; the last two ids.
    """

    def __init__(
        self, merges: Sequence[str] | Sequence[tuple[str, str]], *, cache_size: int = 2**18
    ) -> None:
        """Builds the vocabulary; `load` reads the merges from a file.

        Args:
          merges: pairs of symbols, first the pair to be merged first; "left right" or a tuple.
          cache_size: of how many different pieces the ids are kept, so that words that come again
            cost a look-up only. 0 keeps none; the ids are the same.

        Raises:
          ValueError: a merge is no pair, is made of symbols that no earlier merge gives, or gives
            a symbol a second time.
          ImportError: ftfy or regex is not installed.
        """
        extras.needed("ftfy", _PURPOSE)  # now, not at the first text
        regex = extras.needed("regex", _PURPOSE)
        self._pieces = regex.compile(_PIECES, regex.IGNORECASE)
        self._byte_symbol = byte_symbols()
        self._byte = {symbol: byte for byte, symbol in self._byte_symbol.items()}
        symbols = list(self._byte)
        symbols += [symbol + _END_OF_WORD for symbol in symbols]
        self._ranks = _ranks(merges, symbols)
        symbols += ["".join(pair) for pair in self._ranks]
        symbols += [START_OF_TEXT, END_OF_TEXT]
        self._symbols = symbols
        self._ids = {symbol: place for place, symbol in enumerate(symbols)}
        self.vocab_size = len(symbols)
        self.start_id, self.end_id = self.vocab_size - 2, self.vocab_size - 1
        self._cache: dict[str, list[int]] = {}
        self._cache_size = cache_size

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text of any length, without start and end.

        A special token written out in the text becomes its id, as in the original.

        Raises:
          ValueError: `text` is no string.
        """
        if not isinstance(text, str):
            raise ValueError(f"a text is needed, this is a {type(text).__name__}: {text!r:.80}")
        ids: list[int] = []
        for piece in self._pieces.findall(clean_text(text)):
            found = self._cache.get(piece)
            if found is None:
                found = self._encode_piece(piece)
                if len(self._cache) < self._cache_size:
                    self._cache[piece] = found
            ids += found
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids: a space after each word, U+FFFD for bytes that are no UTF-8.

        Padding is not recognised: id 0 is also "!". Give the ids up to the end token.

        Raises:
          ValueError: an id is outside the vocabulary.
        """
        symbols = []
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"id {token} is not in the vocabulary: 0 to {self.end_id} are")
            symbols.append(self._symbols[token])
        text = bytes(self._byte[letter] for letter in "".join(symbols))
        return text.decode("utf-8", errors="replace").replace(_END_OF_WORD, " ")

    def __call__(
        self,
        texts: str | Sequence[str],
        context_length: int = CONTEXT_LENGTH,
        *,
        truncate: bool = False,
        allow_special: bool = True,
    ) -> np.ndarray:
        """Returns one row of ids a text: start, the text, end, then zeros.

        Args:
          texts: the texts; one string is taken as a list of one.
          context_length: length of the rows.
          truncate: cut texts that are too long, so that the end token is the last of the row.
          allow_special: False refuses texts that hold a special token, which moves the place at
            which the text tower is read (the first end token).

        Returns:
          int32 [n, context_length].

        Raises:
          ValueError: texts are too long, or hold special tokens; names them. Or one is no string.
        """
        if context_length < 2:
            raise ValueError(
                f"context_length={context_length} has no room for the start and the end token: "
                "give 2 or more"
            )
        texts = [texts] if isinstance(texts, str) else list(texts)
        encoded = [self.encode(text) for text in texts]
        special = {self.start_id, self.end_id}
        if not allow_special and (found := [i for i, e in enumerate(encoded) if special & set(e)]):
            raise ValueError(
                f"{_listed([repr(texts[i]) for i in found])} holds {START_OF_TEXT} or {END_OF_TEXT}"
                ", which would be read as the start or the end of the text: remove it"
            )
        long = [i for i, ids in enumerate(encoded) if len(ids) + 2 > context_length]
        if long and not truncate:
            sizes = [f"{texts[i][:100]!r} ({len(encoded[i]) + 2} tokens)" for i in long]
            raise ValueError(
                f"{len(long)} of {len(texts)} texts do not fit into context_length="
                f"{context_length}, start and end token included: {_listed(sizes)}. Shorten them, "
                "or pass truncate=True"
            )
        rows = np.zeros((len(texts), context_length), np.int32)
        for row, ids in zip(rows, encoded, strict=True):
            kept = [self.start_id, *ids[: context_length - 2], self.end_id]
            row[: len(kept)] = kept
        return rows

    def _encode_piece(self, piece: str) -> list[int]:
        if piece in (START_OF_TEXT, END_OF_TEXT):
            return [self._ids[piece]]
        symbols = [self._byte_symbol[byte] for byte in piece.encode("utf-8")]
        symbols[-1] += _END_OF_WORD
        return [self._ids[symbol] for symbol in merge_pairs(symbols, self._ranks)]


def merge_pairs(symbols: Sequence[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Merges neighbours, the pair of lowest rank first and from left to right, until none is left.

    A heap of the pairs keeps this at n log n for n symbols; text without spaces gives long pieces.
    """
    merged: list[str | None] = list(symbols)
    size = len(merged)
    # Left and right neighbour of each symbol that is still there.
    before, after = list(range(-1, size - 1)), list(range(1, size + 1))
    heap: list[tuple[int, int]] = []

    def rank_at(place: int) -> int | None:
        """Rank of the symbol at `place` with its right neighbour."""
        if merged[place] is None or after[place] >= size:
            return None
        return ranks.get((merged[place], merged[after[place]]))

    def push(place: int) -> None:
        if (rank := rank_at(place)) is not None:
            heapq.heappush(heap, (rank, place))

    for place in range(size):
        push(place)
    while heap:
        rank, left = heapq.heappop(heap)
        if rank_at(left) != rank:  # a neighbour has been merged since
            continue
        right = after[left]
        merged[left], merged[right] = merged[left] + merged[right], None
        after[left] = after[right]
        if after[left] < size:
            before[after[left]] = left
        push(left)
        if before[left] >= 0:
            push(before[left])
    return [symbol for symbol in merged if symbol is not None]


def load(
    path: str | os.PathLike[str], *, num_merges: int = NUM_MERGES, cache_size: int = 2**18
) -> ClipTokenizer:
    """Returns the tokenizer of a file of merges: one pair a line, gzipped or not.

    A first line with a version (`#version: 0.2`) is skipped, as are merges after `num_merges`.

    Args:
      path: OpenAI's `bpe_simple_vocab_16e6.txt.gz`, or `merges.txt` of Hugging Face.
      num_merges: merges to use; published CLIP weights need the default.
      cache_size: see `ClipTokenizer`.

    Raises:
      ValueError: there is no such file, it is damaged, too large, no UTF-8 text, too short, or not
        a list of merges that CLIP could use.
      ImportError: ftfy or regex is not installed.
    """
    path = Path(path)
    try:
        lines = _read(path).decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text (byte {error.start}): {_WHERE}") from error
    if "#version:" in lines[0]:
        del lines[0]
    merges = [line.rstrip("\r") for line in lines]
    while merges and not merges[-1]:
        merges.pop()
    if len(merges) < num_merges:
        raise ValueError(
            f"{path} holds {len(merges)} merges, {num_merges} are needed: the file is cut, or "
            f"belongs to another model. {_WHERE}"
        )
    merges = merges[:num_merges]
    if merges and not any(merge.endswith(_END_OF_WORD) for merge in merges):
        raise ValueError(
            f"{path} belongs to another model: none of its merges ends a word ({_END_OF_WORD}), "
            f"as CLIP's do. {_WHERE}"
        )
    try:
        return ClipTokenizer(merges, cache_size=cache_size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}. {_WHERE}") from error


def _read(path: Path) -> bytes:
    """Content of a file, unpacked if it is gzipped; never more than is sensible."""
    if not path.is_file():
        raise ValueError(f"no list of merges at {path}. {_WHERE}")
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if packed else open(path, "rb") as file:
            content = file.read(_LARGEST_FILE + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged, or cut ({error}): fetch it again") from error
    if len(content) > _LARGEST_FILE:
        raise ValueError(
            f"{path} holds more than {_LARGEST_FILE} bytes of text, which is no list of merges. "
            f"{_WHERE}"
        )
    return content


def _ranks(
    merges: Sequence[str] | Sequence[tuple[str, str]], symbols: Sequence[str]
) -> dict[tuple[str, str], int]:
    """Returns `{pair: its rank}`; each pair has to be made of `symbols` and of earlier merges."""
    known, ranks = set(symbols), {}
    for rank, merge in enumerate(merges):
        pair = tuple(merge.split(" ") if isinstance(merge, str) else merge)
        place = f"merge {rank + 1} ({merge!r:.80})"
        if len(pair) != 2:
            raise ValueError(f"{place} is not a pair of two symbols with one space between them")
        unknown = [part for part in pair if part not in known]
        if unknown:
            raise ValueError(f"{place} uses {unknown[0]!r}, which no earlier merge gives")
        joined = "".join(pair)
        if joined in known:
            raise ValueError(f"{place} gives {joined!r}, which an earlier merge gives already")
        known.add(joined)
        ranks[pair] = rank
    return ranks


def _listed(items: Sequence[str]) -> str:
    shown = ", ".join(items[:5])
    return f"{shown} and {len(items) - 5} more" if len(items) > 5 else shown
