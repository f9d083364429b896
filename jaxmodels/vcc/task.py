"""VCC for the trainer: `make_task(config)` picks the task of the data set."""

from typing import Any

from jaxmodels.core.task import Task
from jaxmodels.vcc.facts_task import FactsTask
from jaxmodels.vcc.mlm_task import MaskedLMTask
from jaxmodels.vcc.roberta_qa_task import TASKS as QUESTIONS
from jaxmodels.vcc.seq2seq_task import Seq2SeqTask

TASKS: dict[str, type[Task]] = {
    "pydoc_facts": FactsTask,
    "text_lines": MaskedLMTask,
    **QUESTIONS,
}


def make_task(config: Any) -> Task:
    """Returns the task of `config.data.name`.

    Args:
      config: see `configs/vcc.py` and `configs/vcc_t5.py`; `model.family` is there.

    Raises:
      ValueError: settings that cannot work, before anything is compiled or read.
    """
    if config.model.get("family", "roberta") == "t5":
        return Seq2SeqTask(config)
    name = config.data.name
    if name not in TASKS:
        raise ValueError(f"data.name={name!r}: use one of {', '.join(TASKS)}.")
    return TASKS[name](config)
