"""Sparse encoders against the models of `transformers` with the same random weights."""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import weights
from jaxmodels.core import partitioning
from jaxmodels.trunks import bert, t5
from jaxmodels.vcc.baseline_attentions import BigBird, LongT5, SparseRoberta, SparseT5, Window
from jaxmodels.weights.longt5 import longt5_rules
from tests.trunks.hugging_face import randomized, run
from tests.vcc.small_t5 import QUICK

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

CLOSE = {"rtol": 2e-4, "atol": 2e-5}


def inputs(length: int, real: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(0).integers(2, vocab_size, (2, length))
    mask = (np.arange(length) < np.array([[length], [real]])).astype(np.int64)
    return np.where(mask, ids, 0), mask


def hidden(model: Any, params: Any, ids: np.ndarray, mask: np.ndarray, **more: Any) -> np.ndarray:
    def apply(params: Any, ids: jax.Array, mask: jax.Array) -> Any:
        return model.apply({"params": params}, ids, mask, **more)

    run = jax.jit(apply, compiler_options=QUICK)
    return run(params, jnp.asarray(ids), jnp.asarray(mask))


def saved(model: Any, folder: pathlib.Path) -> weights.TensorFile:
    model.save_pretrained(folder)
    return weights.read(folder)


def as_arrays(tree: Any) -> Any:
    return jax.tree.map(jnp.asarray, tree)


LONGT5 = {
    "vocab_size": 20,
    "d_model": 12,
    "d_kv": 4,
    "num_heads": 2,
    "num_layers": 2,
    "d_ff": 16,
    "local_radius": 3,
    "global_block_size": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 6,
}
OURS = t5.T5Config(
    vocab_size=20,
    d_model=12,
    head_dim=4,
    num_heads=2,
    num_layers=2,
    num_decoder_layers=2,
    d_ff=16,
    num_buckets=8,
    max_distance=6,
)


@pytest.mark.parametrize(
    ("kind", "length", "real", "gated"),
    [
        ("transient-global", 23, 14, False),
        pytest.param("transient-global", 24, 3, True, marks=pytest.mark.slow),
        ("local", 22, 13, False),
    ],
)
def test_longt5_equals_that_of_transformers(
    kind: str, length: int, real: int, gated: bool, tmp_path: pathlib.Path
) -> None:
    told = {"encoder_attention_type": kind, "tie_word_embeddings": not gated}
    told |= {"feed_forward_proj": "gated-gelu" if gated else "relu"}
    theirs = randomized(
        transformers.LongT5EncoderModel(transformers.LongT5Config(**LONGT5, **told))
    )
    ids, mask = inputs(length, real, 20)
    wanted = run(theirs, input_ids=ids, attention_mask=mask).last_hidden_state.numpy()
    file = saved(theirs, tmp_path)
    params = as_arrays(weights.import_tree(file, longt5_rules(file)))
    activation = "gelu_new" if gated else "relu"
    config = dataclasses.replace(OURS, gated=gated, activation=activation)
    pattern = LongT5(3, 4 if kind == "transient-global" else 0)
    found = hidden(SparseT5(config, pattern), params, ids, mask, method="encode")
    np.testing.assert_allclose(found[mask > 0], wanted[mask > 0], **CLOSE)


def test_a_whole_longt5_has_the_tree_of_the_model(tmp_path: pathlib.Path) -> None:
    config = transformers.LongT5Config(**LONGT5, encoder_attention_type="transient-global")
    file = saved(transformers.LongT5ForConditionalGeneration(config), tmp_path)
    found = weights.import_tree(file, longt5_rules(file))
    model = SparseT5(OURS, LongT5(3, 4))
    init = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 9), jnp.int32))
    shapes = jax.tree.map(jnp.shape, found)
    assert shapes == jax.tree.map(jnp.shape, partitioning.unbox(init)["params"])


TRUNK = bert.BertConfig(
    vocab_size=30,
    d_model=12,
    num_layers=2,
    num_heads=2,
    d_ff=16,
    max_positions=64,
    num_token_types=2,
    norm_eps=1e-12,
    position_offset=0,
)
BERT = {
    "vocab_size": 30,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "type_vocab_size": 2,
}


def as_bert(state: dict[str, Any], folder: pathlib.Path) -> Any:
    """Our tree of a model whose keys are those of BERT."""
    kept = {k: v.numpy() for k, v in state.items() if "_global" not in k and "pooler" not in k}
    weights.save_safetensors(folder / "model.safetensors", kept)
    file = weights.read(folder / "model.safetensors")
    return as_arrays(weights.import_tree(file, weights.detect(file).rules(file)))


@dataclasses.dataclass(frozen=True)
class TheirBlocks(BigBird):
    """Random blocks drawn by `transformers`: numpy's global state, seeded by the layer."""

    attentions: tuple[Any, ...] = dataclasses.field(default=(), compare=False)

    def random_blocks(self, num_layers: int, num_heads: int, num_blocks: int) -> np.ndarray:
        length = num_blocks * self.block_size
        found = []
        for attention in self.attentions:
            np.random.seed(attention.seed)
            plan = attention._get_rand_attn_plan(length, self.block_size, self.num_random_blocks)
            blocks = attention._bigbird_block_rand_mask_with_head(
                length, length, self.block_size, self.block_size, num_heads, *plan
            )
            found.append(np.stack(blocks))
        return np.stack(found).astype(np.int32)


@pytest.fixture
def numpy_state() -> Iterator[None]:
    state = np.random.get_state()
    yield
    np.random.set_state(state)


@pytest.mark.parametrize(("training", "length", "real"), [(True, 46, 33), (False, 32, 30)])
def test_bigbird_equals_that_of_transformers(
    training: bool, length: int, real: int, tmp_path: pathlib.Path, numpy_state: None
) -> None:
    """In training the blocks are random; at inference it reads block 0 in place of them all."""
    config = transformers.BigBirdConfig(
        **BERT,
        attention_type="block_sparse",
        block_size=4,
        num_random_blocks=2,
        hidden_act="gelu",
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=1e-12,
    )
    theirs = randomized(transformers.BigBirdModel(config, add_pooling_layer=False))
    theirs.train(training)
    ids, mask = inputs(length, real, 30)
    pattern: Any = TheirBlocks(
        4, 2, attentions=tuple(layer.attention.self for layer in theirs.encoder.layer)
    )
    wanted = run(theirs, input_ids=ids, attention_mask=mask).last_hidden_state.numpy()
    params = as_bert(theirs.state_dict(), tmp_path)
    model = SparseRoberta(TRUNK, pattern)
    found = hidden(model, params, ids, mask)[0]
    np.testing.assert_allclose(found[mask > 0], wanted[mask > 0], **CLOSE)


def test_a_window_equals_longformer_with_one_set_of_projections(tmp_path: pathlib.Path) -> None:
    config = transformers.LongformerConfig(
        **BERT,
        attention_window=[8, 8],
        max_position_embeddings=64,
        pad_token_id=0,
        layer_norm_eps=1e-12,
    )
    theirs = randomized(transformers.LongformerModel(config, add_pooling_layer=False))
    state = theirs.state_dict()
    for key in state:  # the published model has a second set for rows and columns of global tokens
        if "_global" in key:
            state[key].copy_(state[key.replace("_global", "")])
    ids, mask = inputs(27, 19, 30)
    chosen = np.zeros_like(mask)
    chosen[:, [0, 5, 13]] = 1
    wanted = run(
        theirs, input_ids=ids, attention_mask=mask, global_attention_mask=chosen
    ).last_hidden_state.numpy()
    params = as_bert(state, tmp_path)
    model = SparseRoberta(
        dataclasses.replace(TRUNK, position_offset=1, max_positions=63), Window(8, 3, "vip")
    )
    found = hidden(model, params, ids, mask, vip_mask=jnp.asarray(chosen))[0]
    np.testing.assert_allclose(found[mask > 0], wanted[mask > 0], **CLOSE)
