"""The loop runs no step in vain, compiles once, and holds nothing that is switched off."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from jaxmodels import decoding
from jaxmodels.decoding import GenerationSettings
from tests.decoding import tables
from tests.decoding.tables import EOS, PAD, VOCAB
from tests.train import runs


def counted(logits: np.ndarray, prompt: Any, settings: GenerationSettings) -> tuple[Any, int]:
    """Generates, and counts the steps that ran."""
    calls: list[int] = []
    inner = tables.step(logits)

    def step(tokens: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        jax.debug.callback(lambda: calls.append(1))
        return inner(tokens, cache)

    prompt = jnp.asarray(prompt)
    start, cache = tables.first(logits, prompt)
    found = jax.jit(lambda p: decoding.generate(step, p, start, cache, settings))(prompt)
    jax.block_until_ready(found)
    jax.effects_barrier()
    return found, len(calls)


def ends_after(num_tokens: int) -> np.ndarray:
    """A table that generates 3, 4, 5, ... from token 0 and then eos."""
    logits = np.zeros((VOCAB,) * 3, np.float32)
    path = [0, *range(3, 3 + num_tokens - 1), EOS]
    for token, following in zip(path, path[1:], strict=False):
        logits[:, token, following] = 30.0
    return logits


@pytest.mark.parametrize(("beams", "most"), [(1, 1), (1, 2), (1, 9), (2, 1), (2, 4)])
def test_each_token_but_the_first_costs_one_step_and_eos_ends_it(beams: int, most: int) -> None:
    settings = GenerationSettings(
        max_new_tokens=most, eos_token_id=EOS, pad_token_id=PAD, num_beams=beams,
        length_penalty=0.0,
    )  # fmt: skip
    found, calls = counted(ends_after(5), [[0], [0]], settings)
    length = min(most, 5)
    assert calls == length - 1
    np.testing.assert_array_equal(found.lengths, [length] * 2)
    np.testing.assert_array_equal(found.finished, [most >= 5] * 2)
    expected = [3, 4, 5, 6, EOS][:length] + [PAD] * (most - length)
    np.testing.assert_array_equal(found.sequences, [[0, *expected]] * 2)
    np.testing.assert_allclose(found.scores, [0.0] * 2, atol=1e-4)


def test_a_finished_row_waits_in_padding_for_the_others() -> None:
    settings = GenerationSettings(max_new_tokens=9, eos_token_id=EOS, pad_token_id=PAD)
    found, calls = counted(ends_after(5), [[0], [5]], settings)
    assert calls == 4
    np.testing.assert_array_equal(found.lengths, [5, 2])
    np.testing.assert_array_equal(found.sequences[1], [5, 6, EOS] + [PAD] * 7)
    assert found.finished.all()


def test_one_bucket_compiles_once() -> None:
    logits = tables.table()
    settings = GenerationSettings(max_new_tokens=6, eos_token_id=EOS)
    program = jax.jit(
        lambda ids, mask: decoding.generate(
            tables.step(logits), ids, *tables.first(logits, ids), settings, prompt_mask=mask
        )
    )
    for length in (2, 3, 7):
        ids, mask = decoding.pad_to_bucket([[4] * length, [5]], (8, 16))
        program(ids, mask)
    assert program._cache_size() == 1
    program(*decoding.pad_to_bucket([[4] * 9, [5]], (8, 16)))
    assert program._cache_size() == 2


def primitives(jaxpr: Any) -> Iterator[str]:
    """Names of all primitives of a jaxpr, those inside others too."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in core.jaxprs_in_params(equation.params):
            yield from primitives(inner)


def traced(**settings: Any) -> set[str]:
    known = GenerationSettings(**{"max_new_tokens": 5, "eos_token_id": EOS} | settings)
    logits = jnp.asarray(tables.table())

    def step(tokens: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        return cache["a"] * 2.0, cache

    def program(prompt: jax.Array, rng: jax.Array) -> decoding.Generated:
        start = logits[0, :2]
        return decoding.generate(step, prompt, start, {"a": start}, known, rng)

    closed = jax.make_jaxpr(program)(jnp.zeros((2, 1), jnp.int32), jax.random.key(0))
    return set(primitives(closed.jaxpr))


def test_what_is_off_is_not_in_the_program() -> None:
    costly = {"sort", "top_k", "cumsum", "scatter", "random_bits", "pow"}
    assert not costly & traced()
    assert {"argmax", "while"} <= traced()
    assert "while" not in traced(max_new_tokens=1)
    assert costly & traced(repetition_penalty=1.2) == {"scatter"}
    assert costly & traced(no_repeat_ngram_size=3) == {"scatter"}
    assert not costly & traced(min_new_tokens=2, forced_bos_token_id=3, forced_eos_token_id=EOS)
    assert costly & traced(do_sample=True) == {"random_bits"}
    assert costly & traced(do_sample=True, top_k=3) == {"random_bits", "top_k"}
    assert costly & traced(do_sample=True, top_p=0.5) == {"random_bits", "cumsum"}
    assert costly & traced(num_beams=2, length_penalty=0.5) == {"top_k"}


def test_beams_reorder_rows_and_share_scalars() -> None:
    """A cache that remembers every token it was fed equals the sequence it belongs to."""
    logits = tables.table(3)
    inner = tables.step(logits)

    def step(tokens: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        fed, rest = cache
        seen = jax.lax.dynamic_update_slice(fed, tokens[:, None], (0, rest["calls"]))
        found, rest = inner(tokens, rest)
        # A row that was not reordered would spoil its logits here.
        wrong = jnp.any(jnp.where(jnp.arange(7) == rest["calls"] - 1, seen != tokens[:, None], 0))
        previous = seen[:, jnp.maximum(rest["calls"] - 2, 0)]
        found = found + 1e-3 * previous[:, None] + jnp.where(wrong, jnp.nan, 0.0)
        return found, (seen, rest)

    settings = GenerationSettings(max_new_tokens=8, num_beams=3, num_return_sequences=3)
    prompt = jnp.asarray([[0], [4]])
    start, rest = tables.first(logits, prompt)
    cache = (jnp.zeros((2, 7), jnp.int32), rest)
    found = jax.jit(lambda p: decoding.generate(step, p, start, cache, settings))(prompt)
    plain = jax.jit(lambda p: decoding.generate(inner, p, start, rest, settings))(prompt)
    np.testing.assert_array_equal(found.sequences, plain.sequences)  # a shift moves no probability
    assert len({tuple(row) for row in np.asarray(found.sequences)}) == 6


@pytest.mark.parametrize("beams", [1, 3])
def test_step_logits_are_the_steps_own(beams: int) -> None:
    logits = tables.table(1, eos_bonus=2.0)
    chosen = {"max_new_tokens": 6, "num_beams": beams, "repetition_penalty": 2.0}
    found = tables.run(logits, [[5, 3]], return_logits=True, **chosen)
    assert found.step_logits.shape == (6, beams, VOCAB)
    np.testing.assert_array_equal(found.step_logits[0], np.repeat(logits[5, 3][None], beams, 0))
    assert tables.run(logits, [[5, 3]], **chosen).step_logits is None


@pytest.mark.slow
def test_rows_split_over_devices_give_the_same_and_exchange_no_cache() -> None:
    run = runs.python("-m", "tests.decoding.split_rows", devices=2)
    assert run.stdout.strip() == "same", run.stderr
