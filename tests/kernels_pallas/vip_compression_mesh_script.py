"""Run by test_vip_compression.py: the kernels where the batch is split over eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kernels_pallas import vip_compression as vip

AXES = ("node", "device")


def main() -> None:
    """Compares gradients of a split batch with those of one device; prints what was split."""
    mesh = jax.make_mesh((2, 4), AXES, axis_types=(AxisType.Auto,) * 2)
    rng = np.random.default_rng(0)
    coarse = jnp.asarray(rng.standard_normal((8, 4, 128)), jnp.float32)
    difference = jnp.asarray(rng.standard_normal((8, 4, 8, 128)), jnp.float32)
    index = jnp.tile(jnp.array([[2, 0]]), (8, 1))
    mask = jnp.ones((8, 2, 8))

    def loss(backend, axes, coarse, difference):
        on = dict(backend=backend, batch_axes=axes)
        fine, coarse, difference = vip.open_blocks(coarse, difference, index, **on)
        banks = vip.write_back(coarse, difference, index, jnp.sin(fine), mask, **on)
        return sum((jnp.cos(x) ** 2).sum() for x in banks)

    def gradients(backend, axes):
        return jax.jit(jax.grad(functools.partial(loss, backend, axes), argnums=(0, 1)))

    wanted = gradients("xla", ())(coarse, difference)
    with jax.set_mesh(mesh):
        split = NamedSharding(mesh, PartitionSpec(AXES))
        banks = jax.device_put((coarse, difference), split)
        program = gradients("interpret", AXES).lower(*banks).compile()
        found = program(*banks)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        assert a.sharding.is_equivalent_to(split, a.ndim)
    assert "all-gather" not in program.as_text()
    print("split over", len(found[1].sharding.device_set), "devices")


if __name__ == "__main__":
    main()
