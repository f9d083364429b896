"""Layers made twice from the same sizes are equal: jit takes them as static arguments."""

import dataclasses
import functools
from typing import Any

import jax
import pytest

from jaxmodels.core import layers
from jaxmodels.trunks import bart, bert, clip, decoder_config, swin, t5, vit

BERT = bert.BertConfig()
TEXT = clip.TextConfig()
VIT = vit.VitConfig()
SWIN = swin.SIZES["swin_tiny"]
T5 = t5.SIZES["t5_small"]

# By name: what makes the layer (or stack), and a config with another one.
CASES: dict[str, tuple[Any, Any, Any]] = {
    "bert": (BERT, {"d_ff": 8}, lambda c: c.make_layer()),
    "bert_stack": (BERT, {"num_layers": 3}, lambda c: c.make_stack()),
    "clip_text": (TEXT, {"num_layers": 3}, lambda c: c.make_layer()),
    "clip_text_stack": (TEXT, {"d_ff": 8}, lambda c: c.make_stack()),
    "vit": (VIT, {"initialization": "clip"}, lambda c: c.make_layer()),
    "vit_stack": (VIT, {"num_layers": 3}, lambda c: c.make_stack()),
    "vit_as_clip": (
        dataclasses.replace(VIT, initialization="clip"),
        {"num_layers": 3},
        lambda c: c.make_layer(),
    ),
    "vit_embeddings": (
        dataclasses.replace(VIT, initialization="clip"),
        {"d_model": 24},
        lambda c: c.make_embeddings("embeddings"),
    ),
    "swin": (SWIN, {"mlp_ratio": 2.0}, lambda c: c.make_layer(1)),
    "t5_encoder": (T5, {"d_ff": 8}, lambda c: c.make_layer()),
    "t5_decoder": (T5, {"head_dim": 8}, lambda c: c.make_layer(decoder=True)),
    "bart_encoder": (bart.BartConfig(), {"d_ff": 8}, lambda c: c.make_stack()),
    "bart_decoder": (bart.BartConfig(), {"d_ff": 8}, lambda c: c.make_stack(decoder=True)),
    "gpt2": (decoder_config.SIZES["gpt2"], {"d_ff": 8}, lambda c: c.make_stack()),
    # Another depth, another size of the last projections.
    "gpt2_layer": (
        decoder_config.SIZES["gpt2"],
        {"num_layers": 3},
        lambda c: c.make_stack().layer,
    ),
    "llama": (decoder_config.SIZES["llama3_8b"], {"rope_theta": 7.0}, lambda c: c.make_stack()),
}


@pytest.mark.parametrize("name", CASES)
def test_layers_of_the_same_sizes_are_equal_and_of_others_are_not(name) -> None:
    config, change, make = CASES[name]
    one, same, other = make(config), make(config), make(dataclasses.replace(config, **change))
    assert one is not same
    assert one == same and hash(one) == hash(same)
    assert one != other


def test_a_function_of_a_static_layer_is_compiled_once_for_equal_layers() -> None:
    traced = []

    @functools.partial(jax.jit, static_argnums=0)
    def width(layer: Any, x: Any) -> Any:
        traced.append(layer)
        return x * layer.d_model

    config = dataclasses.replace(T5, d_model=8)
    assert [int(width(config.make_layer(), 2)) for _ in range(2)] == [16, 16]
    assert len(traced) == 1


def test_initialisers_are_told_apart_by_their_deviation() -> None:
    assert layers.normal(0.5) is layers.normal(0.5)
    values = layers.normal(0.5)(jax.random.key(0), (1000,))
    assert values.std() == pytest.approx(0.5, rel=0.1)
    assert layers.normal(0.25) is not layers.normal(0.5)
