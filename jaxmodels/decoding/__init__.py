"""Exact generation in one compiled loop, for any model that can take one step.

    settings = decoding.GenerationSettings(max_new_tokens=64, eos_token_id=1, num_beams=4)
    generator = decoding.Generator(t5.T5(config), settings)
    found = generator(params, input_ids, attention_mask)
    found.sequences, found.lengths, found.scores, found.finished

Greedy decoding, sampling and beam search choose the tokens that Hugging Face transformers chooses
from the same logits. `generate` is the loop itself, for models without `start` and `step`;
`pad_to_bucket` keeps prompts of many lengths to a few compiled programs.
"""

from jaxmodels.decoding.beams import beam_search
from jaxmodels.decoding.buckets import POWERS_OF_TWO, pad_to_bucket
from jaxmodels.decoding.contract import Generated, Step
from jaxmodels.decoding.generator import Generator
from jaxmodels.decoding.processors import process
from jaxmodels.decoding.sampling import filter_logits, sample
from jaxmodels.decoding.search import generate
from jaxmodels.decoding.settings import GenerationSettings

__all__ = [
    "POWERS_OF_TWO",
    "Generated",
    "GenerationSettings",
    "Generator",
    "Step",
    "beam_search",
    "filter_logits",
    "generate",
    "pad_to_bucket",
    "process",
    "sample",
]
