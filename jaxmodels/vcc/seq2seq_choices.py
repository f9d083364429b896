"""From `config.data.name` to the data set of a sequence-to-sequence task."""

from typing import Any

from jaxmodels.data import t5_tokenizer, tokenizer
from jaxmodels.vcc import qa_formats, seq2seq_data, span_corruption_data
from jaxmodels.vcc.facts_answers import FactsAnswers

NAMES = ("pydoc_facts", "span_corruption", *qa_formats.FORMATS)


def open_data(config: Any) -> tuple[Any, tuple[int, int]]:
    """Returns a data set as `seq2seq_task` wants it, and its end-of-sequence and padding ids.

    Args:
      config: see `configs/vcc_t5.py`.

    Raises:
      ValueError: no data set of that name, or settings that cannot be.
    """
    name = config.data.name
    if name == "pydoc_facts":
        return FactsAnswers(config), (tokenizer.SEP_ID, tokenizer.PAD_ID)
    ends = (t5_tokenizer.EOS_ID, t5_tokenizer.PAD_ID)
    if name == "span_corruption":
        return span_corruption_data.data_from(config), ends
    if name not in qa_formats.FORMATS:
        raise ValueError(f"data.name={name!r}: use one of {', '.join(NAMES)}.")
    return seq2seq_data.data_from(config), ends
