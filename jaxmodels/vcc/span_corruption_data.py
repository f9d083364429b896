"""T5 span-corruption pre-training from the user's text: sources and batches (section 5).

Batches hold `input_ids`, `attention_mask`, `vip_mask` [B, n] and `labels` [B, T], all int32; labels
that do not count are -100. The sentinels are the VIP tokens.
"""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.data import (
    cache_folder,
    checks,
    folders,
    pipeline,
    t5_tokenizer,
    text_lines,
    tfds_text,
)
from jaxmodels.vcc.inputs import check_inputs
from jaxmodels.vcc.packed_text import PackedText
from jaxmodels.vcc.span_corruption import SpanCorruption, span_corruption_batch


class SpanCorruptionExample:
    """The random transform of a packed text into one example; travels to workers."""

    def __init__(self, tokenizer_path: str, settings: SpanCorruption, num_vip: int | None) -> None:
        """Keeps the settings; the tokenizer is opened on first use, in the worker itself.

        Args:
          tokenizer_path: T5's tokenizer.json.
          settings: lengths, density and ids.
          num_vip: VIP slots of the model; None: it has none.
        """
        self.tokenizer_path, self.settings, self.num_vip = tokenizer_path, settings, num_vip
        self._tokenizer: Any = None

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides the examples, as JSON values."""
        return {
            "objective": dataclasses.asdict(self.settings),
            "tokenizer_sha256": cache_folder.sha256(self.tokenizer_path),
        }

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the opened tokenizer behind."""
        return self.__dict__ | {"_tokenizer": None}

    def __call__(self, record: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns the arrays of one example.

        Raises:
          ValueError: the record has no text.
        """
        if self._tokenizer is None:
            self._tokenizer = t5_tokenizer.load(self.tokenizer_path)
        text = checks.check_text(record, "text")
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        made = {
            name: array[0]
            for name, array in span_corruption_batch(rng, [ids], self.settings).items()
        }
        mask, vip = made["attention_mask"], made["importance_mask"]
        if self.num_vip is not None:
            mask, vip = check_inputs(mask, vip, self.num_vip)
        return {
            "input_ids": made["input_ids"],
            "attention_mask": mask,
            "vip_mask": vip,
            "labels": made["labels"],
        }


@dataclasses.dataclass(frozen=True)
class TextFiles:
    """Text of the user's own files; see `text_lines.TextDocuments`.

    Attributes:
      train, validation: files or patterns; without `validation` there is no evaluation.
      field: field of the text in .jsonl files; None means "text".
      max_bad_records: bad documents that are left out.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...] = ()
    field: str | None = None
    max_bad_records: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError where there are no such files."""
        if not self.train:
            raise ValueError(
                "data.files is empty; name your text with --config.data.files=corpus/*.txt"
            )
        for files in (self.train, self.validation):
            if files:
                text_lines.find_files(list(files))

    def open(self, split: str) -> text_lines.TextDocuments:
        """Returns the documents of "train" or "validation".

        Raises:
          ValueError: there are none.
        """
        files = self.train if split == "train" else self.validation
        if not files:
            raise ValueError("data.validation_files is empty: name text to evaluate on")
        return text_lines.TextDocuments(
            list(files), self.field, "paragraph", max_bad_records=self.max_bad_records
        )


@dataclasses.dataclass(frozen=True)
class TfdsCorpus:
    """Text of a TFDS data set whose records have a field `text`.

    Attributes:
      name: such as "wikipedia/20220620.en".
      train, validation: splits, or slices of one.
      folder: TFDS's folder; None: its default.
    """

    name: str
    train: str = "train[1%:]"
    validation: str = "train[:1%]"
    folder: str | None = None

    def open(self, split: str) -> tfds_text.TfdsText:
        """Returns the documents of "train" or "validation".

        Raises:
          ValueError: they are not prepared.
        """
        chosen = self.train if split == "train" else self.validation
        return tfds_text.open_split(self.name, chosen, data_dir=self.folder)


class SpanCorruptionData:
    """Text as span-corruption batches, ready for a task."""

    def __init__(
        self,
        settings: SpanCorruption,
        text: TextFiles | TfdsCorpus,
        *,
        num_vip: int | None,
        data_dir: str | os.PathLike[str],
        tokenizer: str | os.PathLike[str] | None = None,
    ) -> None:
        """Checks the sizes.

        Args:
          settings: lengths, density and vocabulary; without a `vip_threshold`, ids are VIP from
            vocab_size - 5000 on, or from the tokenizer's end where that is higher.
          text: where the text comes from.
          num_vip: VIP slots of the model; None: it has none.
          data_dir: folder of prepared data.
          tokenizer: T5's tokenizer.json; None trains one on the files.

        Raises:
          ValueError: more spans than VIP slots; a TFDS corpus without a tokenizer.
        """
        spans = settings.lengths.num_spans
        if num_vip is not None and spans > num_vip:
            raise ValueError(
                f"data.length={settings.inputs_length} at noise density {settings.noise_density} "
                f"has {spans} spans, each a VIP token, but model.num_vip={num_vip}: raise num_vip "
                "or corrupt less"
            )
        if isinstance(text, TfdsCorpus) and not tokenizer:
            raise ValueError("data.tfds needs data.tokenizer, the path of T5's tokenizer.json")
        self._settings, self.text, self.num_vip = settings, text, num_vip
        self.data_dir, self._tokenizer = Path(data_dir), tokenizer

    @functools.cached_property
    def tokenizer_path(self) -> str:
        """The tokenizer given, or one trained once on the training files."""
        if self._tokenizer:
            return str(Path(self._tokenizer).expanduser())
        documents = self.text.open("train")
        # Sentinels count down from the vocabulary's end: its own ids must leave them room.
        size = self._settings.vocab_size - self._settings.lengths.num_spans - 1
        settings = dict(documents.fingerprint) | {"t5_vocab_size": size}
        folder = self.data_dir / "t5_tokenizer" / cache_folder.digest(settings)[:16]

        def build(work: Path) -> dict[str, Any]:
            texts = (documents[i]["text"] for i in range(len(documents)))
            t5_tokenizer.train(texts, size, work / "tokenizer.json")
            return {}

        cache_folder.ensure(folder, settings, build, f"training a tokenizer on {documents!r}")
        return str(folder / "tokenizer.json")

    @functools.cached_property
    def settings(self) -> SpanCorruption:
        """The settings, with the VIP threshold.

        Raises:
          ValueError: sentinels would fall on ids of the tokenizer.
        """
        ids = t5_tokenizer.load(self.tokenizer_path).get_vocab_size()
        size, spans = self._settings.vocab_size, self._settings.lengths.num_spans
        if ids > size - 1 - spans:
            raise ValueError(
                f"{self.tokenizer_path} has {ids} ids, and the {spans} sentinels of "
                f"data.length={self._settings.inputs_length} take {size - 1 - spans} to {size - 2} "
                f"of model.vocab_size={size}: raise model.vocab_size to {ids + spans + 1} or more "
                "(the paper's is 38000)"
            )
        if self._settings.vip_threshold is not None:
            return self._settings
        return dataclasses.replace(self._settings, vip_threshold=max(size - 5000, ids))

    @functools.cached_property
    def example(self) -> SpanCorruptionExample:
        """The transform of a packed text."""
        return SpanCorruptionExample(self.tokenizer_path, self.settings, self.num_vip)

    def source(self, split: str) -> PackedText:
        """Returns packed texts of "train" or "validation", long enough for one example each.

        Raises:
          ValueError: there is no text of that split.
        """
        # A word is a token or more, so as many words as tokens always fill an example.
        words = self._settings.lengths.raw_tokens_length
        return PackedText(
            self.text.open(split), words, mark_sentences=False, data_dir=self.data_dir
        )

    def has_validation(self) -> bool:
        """Whether there is text to evaluate on."""
        return bool(self.text.validation)

    def stage(self, batch_size: int, steps: int | None = None) -> pipeline.Stage:
        """Returns the training text as a stage of training."""
        return pipeline.Stage(self.source("train"), self.example, batch_size, steps)

    def train_batches(
        self, batch_size: int, *, seed: int, options: pipeline.PipelineOptions | None = None
    ) -> Any:
        """Returns shuffled batches without end; see `pipeline.train_batches`."""
        return pipeline.train_batches([self.stage(batch_size)], seed=seed, options=options)

    def eval_batches(
        self, split: str, batch_size: int, *, options: pipeline.PipelineOptions | None = None
    ) -> Any:
        """Returns the text of a split once, corrupted the same way every time, with `weight`."""
        return pipeline.eval_batches(self.source(split), self.example, batch_size, options=options)


def data_from(config: Any) -> SpanCorruptionData:
    """Returns the pre-training data that a config asks for.

    Args:
      config: `data.files`, `validation_files`, `field` and `max_bad_records`, or `data.tfds`,
        `tfds_splits` and `tfds_dir`; `data.dir`, `tokenizer`, `length`, `noise_density`,
        `mean_span_length`; `model.vocab_size`, `num_vip`, and `encoder` or `layer_kinds`, which
        say whether there are VIP slots.

    Raises:
      ValueError: settings that cannot be.
    """
    data, model = config.data, config.model
    compressed = "vcc" in (*model.layer_kinds, *(() if model.layer_kinds else (model.encoder,)))
    if data.tfds and data.files:
        raise ValueError("data.files and data.tfds both name text: leave one of them empty")
    text: TextFiles | TfdsCorpus
    if data.tfds:
        text = TfdsCorpus(data.tfds, *data.tfds_splits, folder=data.tfds_dir)
    else:
        files, validation = tuple(data.files), tuple(data.validation_files)
        text = TextFiles(files, validation, data.field, data.max_bad_records)
    return SpanCorruptionData(
        SpanCorruption(
            vocab_size=model.vocab_size,
            inputs_length=data.length,
            noise_density=data.noise_density,
            mean_span_length=data.mean_span_length,
        ),
        text,
        num_vip=model.num_vip if compressed else None,
        data_dir=folders.data_dir(data.dir),
        tokenizer=data.tokenizer,
    )
