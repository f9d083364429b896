"""ELECTRA on the BERT trunk: Hugging Face's numbers; the published sizes of BERT's family."""

import dataclasses
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.core import partitioning
from jaxmodels.trunks import bert
from tests.trunks import hugging_face
from tests.vcc import small

IDS = np.random.default_rng(0).integers(5, 60, (2, 9))
MASK = np.array([[1] * 9, [1] * 6 + [0] * 3])
NARROW = small.trunk(norm_order="post", position_offset=0, norm_eps=1e-12, embedding_size=6)


@pytest.mark.parametrize(("name", "embedding_size"), [
    ("ElectraModel", 8), ("ElectraModel", 16), ("ElectraForPreTraining", 8),
])  # fmt: skip
def test_hugging_face_gives_the_same_numbers(
    name: str, embedding_size: int, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = transformers.ElectraConfig(
        vocab_size=60, embedding_size=embedding_size, hidden_size=16, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=24, max_position_embeddings=12,
    )  # fmt: skip
    theirs = hugging_face.randomized(getattr(transformers, name)(sizes))
    family, settings, params = hugging_face.loaded(theirs, tmp_path)
    assert family == "electra"
    config = bert.BertConfig(**settings)
    assert config.embedding_width == embedding_size and not config.pooler
    types = IDS % 2
    expected = hugging_face.run(theirs, input_ids=IDS, attention_mask=MASK, token_type_ids=types)
    tree = params["params"]
    assert ("embeddings_project" in tree.get("trunk", tree)) == (embedding_size < 16)
    trunk = {"params": tree.get("trunk", tree)}
    found = jax.jit(bert.BertModel(config).apply)(trunk, IDS, MASK, types)
    real = MASK == 1
    if name == "ElectraModel":
        wanted = expected.last_hidden_state.numpy()
    else:
        found = bert.DiscriminatorHead().apply({"params": tree["discriminator"]}, found)
        wanted = expected.logits.numpy()
    np.testing.assert_allclose(found[real], wanted[real], rtol=2e-5, atol=2e-5)


def test_only_narrow_embeddings_are_projected() -> None:
    for size, projected in ((None, False), (16, False), (6, True)):
        model = bert.BertModel(dataclasses.replace(NARROW, embedding_size=size))
        shapes = jax.eval_shape(model.init, jax.random.key(0), IDS)["params"]
        assert ("embeddings_project" in shapes) == projected
        tables = jax.tree.leaves(partitioning.unbox(shapes["embeddings"]))
        assert {leaf.shape[-1] for leaf in tables} == {size or 16}


def test_embeddings_stand_for_ids() -> None:
    model = bert.BertModel(NARROW)
    ids = IDS % 50
    params = small.drawn(model.init, ids, size=0.2, spread=True)
    rows = params["params"]["embeddings"]["word"]["embedding"][ids]
    run = jax.jit(lambda p, ids, rows: model.apply(p, ids, MASK, inputs_embeds=rows))
    chex.assert_trees_all_close(run(params, None, rows), run(params, ids, None), atol=1e-6)
    for given in ((ids, rows), (None, None)):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            run(params, *given)


def test_discriminator_gradient_reaches_the_projection() -> None:
    model, head = bert.BertModel(NARROW), bert.DiscriminatorHead()
    params: Any = small.drawn(model.init, IDS % 50, size=0.2, spread=True)
    own = small.drawn(head.init, jnp.zeros((1, 16)), size=0.2)

    def loss(params: Any) -> jax.Array:
        logits = head.apply(own, model.apply(params, IDS % 50, MASK))
        assert logits.shape == IDS.shape and logits.dtype == jnp.float32
        return jnp.square(logits).sum()

    bar = jax.jit(jax.grad(loss))(params)["params"]
    assert all(float(jnp.abs(leaf).max()) > 1e-4 for leaf in bar["embeddings_project"].values())


def test_an_embedding_of_no_width_is_refused() -> None:
    with pytest.raises(ValueError, match="model.embedding_size=0"):
        dataclasses.replace(NARROW, embedding_size=0)


@pytest.mark.parametrize(
    ("name", "count", "pooler"),
    [
        ("bert_base", 109_482_240, 590_592), ("bert_large", 335_141_888, 1_049_600),
        ("roberta_base", 124_645_632, 590_592), ("roberta_large", 355_359_744, 1_049_600),
        ("electra_small", 13_483_008, 0), ("electra_base", 108_891_648, 0),
        ("electra_large", 334_092_288, 0),
    ],
)  # fmt: skip
def test_published_sizes_have_the_published_parameters(name: str, count: int, pooler: int) -> None:
    model = bert.BertModel(bert.SIZES[name])
    shapes = partitioning.unbox(jax.eval_shape(model.init, jax.random.key(0), IDS))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes.get("pooler"))) == pooler
