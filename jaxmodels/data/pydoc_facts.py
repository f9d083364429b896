"""`pydoc_facts`: real text with facts to look up, built on first use and then only opened.

    source = pydoc_facts.load("data", "train", length=4096, fact_groups=8)
    vocabulary = pydoc_facts.vocabulary("data")
    source[0]["input_ids"]                    # int32 [4096]

On disk, under `data_dir/pydoc_facts/`: one tokenizer a vocabulary size, shared by all lengths (a
curriculum needs that), and one folder a configuration, in TFDS's format (array_record), with a
manifest of digests. A folder appears in one rename, complete; a damaged one is built again.
"""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.data import cache_folder, facts_documents, facts_text, tokenizer
from jaxmodels.data.facts_documents import FactsLayout, FactsVocabulary

NAME = "pydoc_facts"
SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class FactsConfig:
    """Everything that decides the documents.

    Attributes:
      length, questions, fact_groups, facts_per_group, slot: see `facts_documents.FactsLayout`.
      train_documents, validation_documents: documents of the splits (validation uses topics that
        train never sees).
      vocab_size: ids of the tokenizer.
      seed: seed of the documents.
    """

    length: int = 4096
    questions: int = 1
    fact_groups: int = 8
    facts_per_group: int = 4
    slot: int = 32
    train_documents: int = 3000
    validation_documents: int = 512
    vocab_size: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for settings that no document can have."""
        self.layout  # noqa: B018  its construction checks the sizes
        for name in ("train_documents", "validation_documents", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: 0 or more is needed")
        if self.train_documents + self.validation_documents == 0:
            raise ValueError(
                "train_documents and validation_documents are both 0: nothing to build"
            )

    @property
    def layout(self) -> FactsLayout:
        """Sizes of a document."""
        names = [field.name for field in dataclasses.fields(FactsLayout)]
        return FactsLayout(**{name: getattr(self, name) for name in names})

    @property
    def name(self) -> str:
        """Name of the folder: the settings, readable."""
        return (
            f"n{self.length}_q{self.questions}_g{self.fact_groups}x{self.facts_per_group}"
            f"_slot{self.slot}_t{self.train_documents}_v{self.validation_documents}"
            f"_bpe{self.vocab_size}_s{self.seed}"
        )


class FactsSource:
    """Random access to the documents of one split.

    A record is a dict: `input_ids [length]` int32, `vip_mask [length]` and `attention_mask
    [length]` bool, and int32 `question_positions [Q]`, `answers [Q]`, `answer_positions [Q]`,
    `fact_positions [facts]` (see `facts_documents.generate`).
    """

    def __init__(self, records: Any, fingerprint: dict[str, Any], folder: str = "") -> None:
        """Wraps what `tfds.data_source` gives; `fingerprint` as of `source_fingerprint`."""
        self._records = records
        self._folder = folder
        self.fingerprint = fingerprint

    def where(self, index: int) -> str:
        """Returns the folder that holds document `index`."""
        del index
        return self._folder

    def __len__(self) -> int:
        """Returns the number of documents."""
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns document `index`.

        Raises:
          IndexError: there is no such document.
        """
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)} in {self.fingerprint['name']}")
        record = dict(self._records[index])
        num_vip = int(record.pop("num_vip"))
        ids = record["input_ids"].astype(np.int32)
        record["input_ids"] = ids
        record["vip_mask"] = np.arange(len(ids)) < num_vip
        record["attention_mask"] = ids != tokenizer.PAD_ID
        return record

    def __repr__(self) -> str:
        """Returns a stable description, which grain shows in its messages."""
        known = self.fingerprint
        return f"FactsSource({known['config']}/{known['split']}, {len(self)} documents)"


def load(
    data_dir: str | os.PathLike[str],
    split: str,
    config: FactsConfig | None = None,
    **overrides: Any,
) -> FactsSource:
    """Opens a split, building the data set first when it is missing or damaged.

    Args:
      data_dir: folder of all data sets.
      split: "train" or "validation".
      config: settings; defaults to `FactsConfig()`.
      **overrides: single fields of the settings, `length=512` for instance.

    Raises:
      ValueError: an unknown split, an empty one, or settings that no document can have.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: pydoc_facts has {' and '.join(SPLITS)}")
    config = dataclasses.replace(config or FactsConfig(), **overrides)
    if not getattr(config, f"{split}_documents"):
        raise ValueError(
            f"split {split!r} is empty: {split}_documents=0. Give it at least one document"
        )
    folder, manifest = _prepare(Path(data_dir) / NAME, config)
    records = _quietly_open(folder).as_data_source(split)
    return FactsSource(records, _fingerprint(config, manifest, split), str(folder))


def vocabulary(
    data_dir: str | os.PathLike[str], vocab_size: int = FactsConfig.vocab_size
) -> FactsVocabulary:
    """Returns the ids of keys, values and special tokens; trains the tokenizer when it is missing.

    All lengths of one `vocab_size` in one `data_dir` share the tokenizer.
    """
    return facts_documents.vocabulary_of(str(_tokenizer(Path(data_dir) / NAME, vocab_size)))


def source_fingerprint(
    data_dir: str | os.PathLike[str],
    split: str,
    config: FactsConfig | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Returns what identifies the data, as JSON values; arguments and errors as of `load`.

    Keys: name, version, config, split, records, settings, topics_sha256 (the text differs between
    Python versions), tokenizer_sha256, files_sha256.
    """
    return load(data_dir, split, config, **overrides).fingerprint


def _fingerprint(config: FactsConfig, manifest: dict[str, Any], split: str) -> dict[str, Any]:
    """Picks the part of a manifest that identifies `split`."""
    digests = {name: entry for name, entry in manifest["files"].items() if f"-{split}." in name}
    return {
        "name": NAME,
        "config": config.name,
        "split": split,
        "records": getattr(config, f"{split}_documents"),
        "settings": dataclasses.asdict(config),
        **manifest["facts"],
        "files_sha256": cache_folder.digest(digests),
    }


def _prepare(root: Path, config: FactsConfig) -> tuple[Path, dict[str, Any]]:
    """Returns the complete folder of `config` and its manifest; builds it when needed."""
    bpe_path = _tokenizer(root, config.vocab_size)
    settings = dataclasses.asdict(config) | {"tokenizer_sha256": cache_folder.sha256(bpe_path)}
    folder = root / config.name
    message = (
        f"preparing pydoc_facts: {config.train_documents} + {config.validation_documents} "
        f"documents of {config.length} tokens in {folder}"
    )

    def build(work: Path) -> dict[str, Any]:
        return {
            "version": _write_records(work, config, bpe_path),
            "topics_sha256": facts_text.topics_sha256(facts_text.topics()),
            "tokenizer_sha256": settings["tokenizer_sha256"],
        }

    manifest = cache_folder.ensure(folder, settings, build, message)
    return folder / manifest["facts"]["version"], manifest


def _tokenizer(root: Path, vocab_size: int) -> Path:
    """Returns the tokenizer's path; trains it when it is missing or damaged."""
    folder = root / f"tokenizer_bpe{vocab_size}"

    def build(work: Path) -> dict[str, Any]:
        texts = facts_text.split_topics(facts_text.topics())["train"].values()
        tokenizer.train_bpe(texts, vocab_size, facts_text.ALL_WORDS, work / "tokenizer.json")
        return {}

    cache_folder.ensure(folder, {"vocab_size": vocab_size}, build)
    return folder / "tokenizer.json"


def _write_records(work: Path, config: FactsConfig, bpe_path: Path) -> str:
    """Runs the TFDS builder and moves its files to `work/<version>`; returns the version."""
    with _quiet():
        import tensorflow_datasets as tfds

        from jaxmodels.data import pydoc_facts_builder

        builder = pydoc_facts_builder.PydocFacts(
            data_dir=str(work / "tfds"),
            file_format="array_record",
            config=pydoc_facts_builder.PydocFactsConfig(
                name=config.name,
                description=str(config),
                layout=config.layout,
                records={split: getattr(config, f"{split}_documents") for split in SPLITS},
                seed=config.seed,
                tokenizer_path=str(bpe_path),
            ),
        )
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=1))
    version = str(builder.version)
    Path(builder.data_path).rename(work / version)
    shutil.rmtree(work / "tfds")
    return version


def _quietly_open(folder: Path) -> Any:
    """Returns the read-only TFDS builder of a finished folder."""
    with _quiet():
        import tensorflow_datasets as tfds

        return tfds.builder_from_directory(str(folder))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS's progress bars, prints and log lines off the screen; errors are still raised."""
    from absl import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            import tensorflow_datasets as tfds

            tfds.disable_progress_bar()
            yield
    finally:
        logging.set_verbosity(verbosity)
