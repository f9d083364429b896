"""Fine-tuning data of T5 models with VIP marks: batches of a data set, and scores of its answers.

data = Seq2SeqData("qasper", settings, path="scrolls/", data_dir="data", vocab_size=32128,
                   tokenizer="t5-base/tokenizer.json")
train = data.train_batches(batch_size=32, seed=1234)
evaluation = data.eval_batches("validation", batch_size=32)
scores = data.scores("validation", (batch, generated ids) pairs)
"""

import functools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.data import cache_folder, folders, pipeline, t5_tokenizer, text_metrics
from jaxmodels.data.records import describe_briefly, name_record
from jaxmodels.vcc import qa_formats, qa_sources
from jaxmodels.vcc.seq2seq_example import Seq2SeqExample, Seq2SeqSettings

REFERENCES = ("single", "all")
_TOKENIZER_RECORDS = 2000  # enough text for a tokenizer of a small model


class NumberedRecords:
    """Records that know their number, with the answers that count as right for each."""

    def __init__(self, source: Any, answer: Any, references: str = "single") -> None:
        """Wraps a source.

        Args:
          source: random access to records.
          answer: record -> its text; see `qa_formats.Format`.
          references: "single": a record is judged by its own answer, as in the paper. "all":
            records with the same `id` are one question with several answers, asked once.

        Raises:
          ValueError: `references` is neither.
        """
        if references not in REFERENCES:
            raise ValueError(f"references={references!r}: use one of {', '.join(REFERENCES)}")
        self.source, self.answer, self.grouped = source, answer, references == "all"
        self._groups = _groups(source) if self.grouped else [[i] for i in range(len(source))]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the records, as JSON values."""
        return dict(self.source.fingerprint) | {"grouped": self.grouped}

    @property
    def left_out(self) -> int:
        """Bad records that the source left out."""
        return getattr(self.source, "left_out", 0)

    def __len__(self) -> int:
        """Returns the number of records."""
        return len(self._groups)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns record `index`, with its number as `record`."""
        return dict(self.source[self._groups[index][0]]) | {"record": index}

    def where(self, index: int) -> str:
        """Returns where record `index` lies."""
        return self.source.where(self._groups[index][0])

    def references(self, index: int) -> list[str]:
        """Returns the answers of record `index`, uncut.

        Raises:
          ValueError: one of them is missing; names the record.
        """
        found = []
        for row in self._groups[index]:
            try:
                found.append(self.answer(self.source[row]))
            except ValueError as error:
                raise ValueError(f"{name_record(self.source, row)}: {error}") from error
        return found

    def __repr__(self) -> str:
        """Returns a short description."""
        return f"NumberedRecords({self.source!r})"


class Seq2SeqData:
    """One data set of the paper, ready for a task."""

    def __init__(
        self,
        name: str,
        settings: Seq2SeqSettings,
        *,
        vocab_size: int,
        data_dir: str | os.PathLike[str],
        tokenizer: str | os.PathLike[str] | None = None,
        path: str | os.PathLike[str] | None = None,
        tfds_dir: str | os.PathLike[str] | None = None,
        references: str = "single",
    ) -> None:
        """Checks the names; nothing is read yet.

        Args:
          name: a key of `qa_formats.FORMATS`.
          settings: sizes and choices.
          vocab_size: rows of the model's word table.
          data_dir: folder of prepared data.
          tokenizer: T5's tokenizer.json; None trains a small one on the data set.
          path, tfds_dir: see `qa_sources.open_split`.
          references: see `NumberedRecords`; for evaluations.

        Raises:
          ValueError: no such data set, or no such way to judge.
        """
        self.format = qa_formats.get_format(name)
        if references not in REFERENCES:
            raise ValueError(f"references={references!r}: use one of {', '.join(REFERENCES)}")
        self.name, self.settings, self.vocab_size = name, settings, vocab_size
        self.data_dir, self._tokenizer = Path(data_dir), tokenizer
        self._path, self._tfds_dir, self._references = path, tfds_dir, references
        self._sources: dict[str, Any] = {}
        self._records: dict[str, NumberedRecords] = {}

    @functools.cached_property
    def tokenizer_path(self) -> str:
        """The tokenizer given, or one trained once on the data set.

        Raises:
          ValueError: it has more ids, with the format's own tokens, than the model has rows.
        """
        path = str(Path(self._tokenizer).expanduser()) if self._tokenizer else self._trained()
        ids = t5_tokenizer.load(path, self.format.added_tokens).get_vocab_size()
        if ids > self.vocab_size:
            raise ValueError(
                f"{path} has {ids} ids with the {len(self.format.added_tokens)} that {self.name} "
                f"adds, model.vocab_size is {self.vocab_size}; raise it to at least {ids}"
            )
        return path

    @functools.cached_property
    def example(self) -> Seq2SeqExample:
        """The transform of training; it also encodes and decodes for predictions."""
        return Seq2SeqExample(self.name, self.settings, self.tokenizer_path)

    def source(self, split: str) -> Any:
        """Returns the records of a split, opened once.

        Raises:
          ValueError: see `qa_sources.open_split`.
        """
        if split not in self._sources:
            self._sources[split] = qa_sources.open_split(
                self.name, split, data_dir=self.data_dir, path=self._path, tfds_dir=self._tfds_dir
            )
        return self._sources[split]

    def stage(self, batch_size: int, steps: int | None = None) -> pipeline.Stage:
        """Returns the training split as a stage of training."""
        return pipeline.Stage(self.source("train"), self.example, batch_size, steps)

    def train_batches(
        self, batch_size: int, *, seed: int, options: pipeline.PipelineOptions | None = None
    ) -> Any:
        """Returns shuffled batches without end; see `pipeline.train_batches`."""
        return pipeline.train_batches([self.stage(batch_size)], seed=seed, options=options)

    def eval_batches(
        self, split: str, batch_size: int, *, options: pipeline.PipelineOptions | None = None
    ) -> Any:
        """Returns every record once, with `weight` and `record` [B]; see `pipeline.eval_batches`.

        The order of paragraphs is the same in every evaluation.
        """
        transform = Seq2SeqExample(self.name, self.settings, self.tokenizer_path, numbered=True)
        return pipeline.eval_batches(self.records(split), transform, batch_size, options=options)

    def records(self, split: str) -> NumberedRecords:
        """Returns the records of an evaluation, with all answers to each."""
        if split not in self._records:
            source = self.source(split)
            self._records[split] = NumberedRecords(source, self.format.answer, self._references)
        return self._records[split]

    def scores(
        self, split: str, generated: Iterable[tuple[Mapping[str, Any], Any]]
    ) -> dict[str, float]:
        """Judges generated answers against the uncut ones of the data set.

        Args:
          split: the split that was generated for.
          generated: pairs of a batch of `eval_batches` and its ids [B, any length].

        Returns:
          the exact mean over the records of each metric of the data set, 0 to 1, and `count`.

        Raises:
          ValueError: nothing was generated, or a record was judged twice.
        """
        records, total = self.records(split), text_metrics.TextMetrics(self.format.metrics)
        seen: set[int] = set()
        for batch, ids in generated:
            rows = zip(batch["record"], batch["weight"], np.asarray(ids), strict=True)
            for record, weight, row in rows:
                if not weight:
                    continue
                if int(record) in seen:
                    raise ValueError(
                        f"record {int(record)} of {describe_briefly(records)} was judged before: "
                        "give the batches of one evaluation"
                    )
                seen.add(int(record))
                total.add(self.example.decode(row), records.references(int(record)))
        return total.result()

    def _trained(self) -> str:
        """Trains a tokenizer on the first records of the training split, once."""
        source = self.source("train")
        size = self.vocab_size - len(self.format.added_tokens)
        settings = dict(source.fingerprint) | {"format": self.name, "vocab_size": size}
        folder = self.data_dir / "t5_tokenizer" / cache_folder.digest(settings)[:16]

        def texts() -> Iterable[str]:
            for index in range(min(len(source), _TOKENIZER_RECORDS)):
                try:
                    record = source[index]
                    yield from self.format.inputs(record, qa_formats.in_order)
                    yield self.format.answer(record)
                except ValueError:
                    continue  # a bad record is told when a batch needs it

        def build(work: Path) -> dict[str, Any]:
            t5_tokenizer.train(texts(), size, work / "tokenizer.json")
            return {}

        cache_folder.ensure(folder, settings, build, f"training a tokenizer on {source!r}")
        return str(folder / "tokenizer.json")


def data_from(config: Any) -> Seq2SeqData:
    """Returns the data set that a config asks for.

    Args:
      config: `data.name`, `path`, `tfds_dir`, `dir`, `tokenizer`, `length`, `target_length`,
        `exact_vip`, `long_query`, `shuffle`, `references`; `model.vocab_size`, `num_vip`,
        `overflow`, and `encoder` or `layer_kinds`, which say whether there are VIP slots.

    Raises:
      ValueError: settings that cannot be.
    """
    data, model = config.data, config.model
    compressed = "vcc" in (*model.layer_kinds, *(() if model.layer_kinds else (model.encoder,)))
    settings = Seq2SeqSettings(
        encoder_length=data.length,
        decoder_length=data.target_length,
        num_vip=model.num_vip if compressed else None,
        exact_vip=data.exact_vip,
        overflow=model.overflow,
        long_query=data.long_query,
        shuffle=data.shuffle,
    )
    return Seq2SeqData(
        data.name,
        settings,
        vocab_size=model.vocab_size,
        data_dir=folders.data_dir(data.dir),
        tokenizer=data.tokenizer,
        path=data.path,
        tfds_dir=data.tfds_dir,
        references=data.references,
    )


def _groups(source: Any) -> list[list[int]]:
    """Rows of each question: those with the same `id`, in the order of their first."""
    groups: dict[Any, list[int]] = {}
    for row in range(len(source)):
        try:
            key = source[row].get("id")
        except ValueError:
            key = None  # a bad record is told when a batch needs it
        groups.setdefault(("row", row) if key is None else ("id", key), []).append(row)
    return list(groups.values())
