"""One tokenizer and one small data set for all tests of the data floor."""

import pathlib
from typing import Any

import pytest

from jaxmodels.data import facts_text, pydoc_facts, tokenizer

SMALL = pydoc_facts.FactsConfig(
    length=128, questions=2, fact_groups=2, train_documents=40, validation_documents=10
)


# Native readers, held until the process ends: a worker of the tests has crashed in one of their
# threads while pytest let go of the fixtures of a session.
_HELD: list[Any] = []


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder of data sets; tests that damage something copy it."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def vocabulary(data_dir: pathlib.Path) -> pydoc_facts.FactsVocabulary:
    return pydoc_facts.vocabulary(data_dir)


@pytest.fixture(scope="session")
def bpe(vocabulary: pydoc_facts.FactsVocabulary) -> Any:
    _HELD.append(tokenizer.load(vocabulary.tokenizer_path))
    return _HELD[-1]


@pytest.fixture(scope="session")
def small(data_dir: pathlib.Path) -> pydoc_facts.FactsSource:
    """The train split of `SMALL`."""
    _HELD.append(pydoc_facts.load(data_dir, "train", SMALL))
    return _HELD[-1]


@pytest.fixture(scope="session")
def topics() -> dict[str, dict[str, str]]:
    return facts_text.split_topics(facts_text.topics())
