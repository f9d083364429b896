"""VCC for the trainer: `make_task(config)` picks the task of the data set."""

from typing import Any

from jaxmodels.core.task import Task
from jaxmodels.vcc.facts_task import FactsTask
from jaxmodels.vcc.mlm_task import MaskedLMTask

TASKS: dict[str, type[Task]] = {"pydoc_facts": FactsTask, "text_lines": MaskedLMTask}


def make_task(config: Any) -> Task:
    """Returns the task of `config.data.name`.

    Args:
      config: see `configs/vcc.py`.

    Raises:
      ValueError: settings that cannot work, before anything is compiled or read.
    """
    name = config.data.name
    if name not in TASKS:
        raise ValueError(f"data.name={name!r}: use one of {', '.join(TASKS)}.")
    return TASKS[name](config)
