"""Opening and closing blocks: the TPU kernels, interpreted, and the gradients that keep no bank."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxmodels.vcc import compression
from kernels_pallas import vip_compression as vip
from kernels_pallas.vip_compression import gpu, reference, tpu, tpu_visit
from tests.train import runs

KERNELS = ("refine", "write_back", "refine_gradient", "write_back_gradient", "enter", "leave")


@functools.lru_cache
def arrays(batch=2, blocks=9, size=8, width=128, opened=5, coarse="float32", difference="float32"):
    """C, D, indices, F, M of the opened blocks, M of all blocks; one block is all padding."""
    rng = np.random.default_rng(0)
    draw = rng.standard_normal
    index = np.stack([rng.permutation(blocks)[:opened] for _ in range(batch)])
    mask = rng.integers(0, 2, (batch, blocks, size))
    mask[:, index[0, 0]] = 0
    return (
        jnp.asarray(draw((batch, blocks, width)), coarse),
        jnp.asarray(draw((batch, blocks, size, width)), difference),
        jnp.asarray(index, jnp.int32),
        jnp.asarray(draw((batch, opened, size, width)), jnp.promote_types(coarse, difference)),
        jnp.asarray(np.take_along_axis(mask, index[..., None], 1), jnp.float32),
        jnp.asarray(mask, jnp.float32),
    )


def arguments(name, given):
    coarse, difference, index, fine, opened_mask, mask = given
    return {
        "refine": (coarse, difference, index),
        "write_back": (coarse, difference, index, fine, opened_mask),
        "refine_gradient": (coarse, difference, index, fine),
        "write_back_gradient": (coarse, difference, index, opened_mask),
        "enter": (fine, opened_mask),
        "leave": (coarse, difference, mask),
        "enter_gradient": (coarse, difference, mask),
    }[name]


def close(found, wanted, rtol=2e-6):
    """Equal to `rtol` of the largest entry (bfloat16: to one rounding), in the same dtypes."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        limit = rtol if found_dtype(found) == jnp.float32 else 1 / 128
        assert np.abs(a - b).max() <= limit * np.abs(b).max()


def found_dtype(tree):
    """The narrowest dtype in it."""
    return min((leaf.dtype for leaf in jax.tree.leaves(tree)), key=lambda d: d.itemsize)


SHAPES = {
    "tiles_and_a_rest": dict(),
    "one_block_open": dict(opened=1),
    "all_open_bfloat16": dict(opened=9, size=16, coarse="bfloat16", difference="bfloat16"),
    "wide_blocks_float32_means_bfloat16_bank": dict(
        batch=1, blocks=3, size=128, width=768, opened=2, difference="bfloat16"
    ),
}
CASES = [
    pytest.param(shape, name, marks=() if i in (0, 2) and name[0] != "l" else pytest.mark.slow)
    for i, shape in enumerate(SHAPES)
    for name in KERNELS
]


@pytest.mark.parametrize(("shape", "name"), CASES)
def test_each_kernel_does_what_the_reference_does(shape, name, monkeypatch):
    monkeypatch.setattr(tpu_visit, "MOST_BLOCKS", 2)
    given = arguments(name, arrays(**SHAPES[shape]))
    kernel = jax.jit(functools.partial(getattr(tpu, name), interpret=True))
    close(kernel(*given), jax.jit(getattr(reference, name))(*given))


GPU_KERNELS = ("write_back", "refine_gradient", "write_back_gradient")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", GPU_KERNELS)
def test_each_gpu_kernel_does_what_the_reference_does(name, dtype):
    given = arguments(name, arrays(size=4, width=256, coarse=dtype, difference=dtype))
    kernel = jax.jit(functools.partial(getattr(gpu, name), interpret=True))
    close(kernel(*given), jax.jit(getattr(reference, name))(*given))


@pytest.mark.slow
def test_copies_of_a_kernel_do_not_race_and_read_nothing_unwritten(monkeypatch):
    """The simulator of DMAs: tiles in flight, semaphores, memory that starts as NaN."""
    monkeypatch.setattr(tpu_visit, "MOST_BLOCKS", 2)
    given = arguments("write_back_gradient", arrays(batch=1))
    interpret = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", dma_execution_mode="on_wait"
    )
    close(
        tpu.write_back_gradient(*given, interpret=interpret),
        reference.write_back_gradient(*given),
    )


def plain(coarse, difference, index, mask, change):
    """Open, change, close, leave: jax.numpy alone, with the gradients that jax finds."""
    examples = jnp.arange(len(index))[:, None]
    fine = coarse[examples, index][:, :, None] - difference[examples, index]
    opened = mask[examples, index][..., None]
    new = (fine + jnp.sin(fine * change)) * opened
    mean = new.sum(2) / (opened.sum(2) + 1e-4)
    coarse = (1.5 * coarse).at[examples, index].set(mean)
    difference = difference.at[examples, index].set(mean[:, :, None] - new)
    return (coarse[:, :, None] - difference) * mask[..., None]


def ours(backend, coarse, difference, index, mask, change, hand_on=True):
    fine = vip.refine(coarse, difference, index, backend=backend)
    if hand_on:
        fine, coarse, difference = vip.open_blocks(coarse, difference, index, backend=backend)
    new = fine + jnp.sin(fine * change)
    opened = mask[jnp.arange(len(index))[:, None], index]
    banks = vip.write_back(1.5 * coarse, difference, index, new, opened, backend=backend)
    return vip.leave(*banks, mask, backend=backend)


@pytest.mark.parametrize(
    ("backend", "hand_on"), [("xla", True), ("xla", False), ("interpret", True), (None, True)]
)
def test_gradients_are_those_of_the_plain_formula(backend, hand_on):
    coarse, difference, index, _, _, mask = arrays()
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(difference.shape), jnp.float32)

    def both(function):
        def loss(*states):
            return (function(*states[:2], index, mask, states[2]) * weights).sum()

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(coarse, difference, 0.7)

    value, found = both(functools.partial(ours, backend, hand_on=hand_on))
    wanted_value, wanted = both(plain)
    np.testing.assert_allclose(value, wanted_value, rtol=1e-5)
    close(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("backend", ["xla", "interpret"])
def test_gradient_of_entering_is_that_of_the_plain_formula(backend):
    _, tokens, _, _, _, mask = arrays()

    def loss(enter, tokens):
        coarse, difference = enter(tokens, mask)
        return (jnp.cos(coarse)[:, :, None] * jnp.sin(difference)).sum()

    found = jax.jit(jax.grad(lambda x: loss(functools.partial(vip.enter, backend=backend), x)))
    wanted = jax.jit(jax.grad(lambda x: loss(compression.compress, x)))
    close(found(tokens), wanted(tokens), rtol=1e-5)


def test_what_is_entered_and_left_is_the_masked_sequence():
    _, tokens, _, _, _, mask = arrays()
    left = vip.leave(*vip.enter(tokens, mask), mask)
    close(left, tokens * mask[..., None], rtol=1e-6)
    assert (np.asarray(left)[np.asarray(mask) == 0] == 0).all()


def test_an_unopened_block_keeps_every_bit():
    coarse, difference, index, fine, mask, _ = arrays()
    write = jax.jit(functools.partial(vip.write_back, backend="interpret"))
    new_coarse, new_difference = write(coarse, difference, index, fine, mask)
    for i, opened in enumerate(np.asarray(index)):
        rest = np.setdiff1d(np.arange(coarse.shape[1]), opened)
        np.testing.assert_array_equal(new_coarse[i, rest], coarse[i, rest])
        np.testing.assert_array_equal(new_difference[i, rest], difference[i, rest])


def test_the_reference_is_the_compression_of_the_library():
    coarse, difference, index, fine, mask, _ = arrays()
    state = compression.State(coarse[:, :1], coarse, difference)
    np.testing.assert_array_equal(
        compression.refine(state, index), reference.refine(coarse, difference, index)
    )
    mean, change = compression.compress(fine, mask)
    np.testing.assert_array_equal(mean, reference.compress(fine, mask[..., None])[0][:, :, 0])
    np.testing.assert_array_equal(change, reference.compress(fine, mask[..., None])[1])


def test_the_mean_is_exact_in_bfloat16_banks():
    """The difference is to the float32 mean: formed in bfloat16 it would be off by its rounding."""
    coarse, difference, index, fine, mask, _ = arrays(coarse="bfloat16", difference="bfloat16")
    _, change = vip.write_back(coarse, difference, index, fine, mask)
    exact = reference.compress(fine, mask[..., None])[1].astype(jnp.bfloat16)
    np.testing.assert_array_equal(reference.take(change, index), exact)


def test_the_gradient_keeps_indices_and_masks_only():
    coarse, difference, index, fine, mask, _ = arrays()

    def layer(coarse, difference, fine):
        opened, coarse, difference = vip.open_blocks(coarse, difference, index)
        return vip.write_back(coarse, difference, index, opened + fine, mask)

    _, pull = jax.vjp(layer, coarse, difference, fine)
    kept = [leaf.shape for leaf in jax.tree.leaves(pull) if hasattr(leaf, "shape")]
    assert max(map(np.prod, kept)) <= mask.size, kept


def test_no_open_block_changes_nothing():
    coarse, difference, index, fine, mask, _ = arrays()
    index, fine, mask = index[:, :0], fine[:, :0], mask[:, :0]
    opened, *banks = vip.open_blocks(coarse, difference, index)
    assert opened.shape == (2, 0, 8, 128)
    assert vip.write_back(*banks, index, opened, mask) == (coarse, difference)


def test_traced_indices_beyond_the_ends_are_moved_to_the_ends():
    coarse, difference, *_ = arrays()
    last = coarse.shape[1] - 1
    for backend in ("xla", "interpret"):
        refine = jax.jit(functools.partial(vip.refine, backend=backend))
        found = refine(coarse, difference, jnp.array([[-3, 99], [0, last]]))
        wanted = vip.refine(coarse, difference, jnp.array([[0, last], [0, last]]))
        np.testing.assert_array_equal(found, wanted)


def wrong(**changes):
    names = ("coarse", "difference", "index", "fine", "mask")
    return list((dict(zip(names, arrays()[:5], strict=True)) | changes).values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(coarse=jnp.zeros((2, 8, 128))), r"coarse \(2, 8, 128\): must be \(2, 9, 128\)"),
        (dict(difference=jnp.zeros((2, 9, 128))), r"must be \[batch, m, block, d_model\]"),
        (dict(coarse=jnp.zeros((2, 9, 128), jnp.float16)), "float16: must be float32 or bfloat16"),
        (dict(index=jnp.zeros((2, 10), int)), r"index \(2, 10\): must be \[2, k\] with k <= 9"),
        (dict(index=jnp.zeros((2, 5))), "index is float32: must be an integer"),
        (dict(index=jnp.array([[0, 1, 2, 3, 9]] * 2)), r"holds 0 to 9: must be within \[0, 9\)"),
        (dict(index=jnp.array([[0, 1, 2, 3, 3]] * 2)), "names a block twice"),
        (dict(fine=jnp.zeros((2, 5, 4, 128))), r"fine \(2, 5, 4, 128\): must be \(2, 5, 8, 128\)"),
        (dict(mask=jnp.zeros((2, 9, 8))), r"mask \(2, 9, 8\): must be \(2, 5, 8\)"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        vip.write_back(*wrong(**change))


def test_a_backend_that_does_not_exist_or_does_not_fit_is_refused():
    coarse, difference, index, *_ = arrays()
    with pytest.raises(ValueError, match="use one of xla, tpu, gpu"):
        vip.refine(coarse, difference, index, backend="triton")
    small = coarse[..., :96], difference[..., :96]
    with pytest.raises(ValueError, match="8 tokens x 96 do not fit its kernels"):
        vip.refine(*small, index, backend="tpu")
    np.testing.assert_array_equal(
        vip.refine(*small, index), vip.refine(coarse, difference, index)[..., :96]
    )


@pytest.mark.slow
def test_a_batch_that_is_split_over_devices_stays_split():
    done = runs.python("-m", "tests.kernels_pallas.vip_compression_mesh_script", devices=8)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "split over 8 devices"
