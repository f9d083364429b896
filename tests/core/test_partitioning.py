"""Meshes and layouts: sizes that fit, the axis a parameter is split on, refusals with numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxmodels.core import params as params_lib
from jaxmodels.core import partitioning
from jaxmodels.trunks import bert
from tests.train import runs


class FakeDevice:
    """A device of a slice, of which only the layout matters."""

    platform = "cpu"

    def __init__(self, number: int, slices: int | None = None) -> None:
        self.id, self.process_index = number, number // 4
        if slices:
            self.slice_index = number * slices // 8

    def __repr__(self) -> str:
        return f"D{self.id}"


EIGHT = [FakeDevice(i) for i in range(8)]


@pytest.mark.parametrize(
    ("node", "device", "slices", "shape"),
    [
        (-1, -1, None, (2, 4)),  # two processes
        (-1, -1, 4, (4, 2)),  # slices count where the platform knows them
        (-1, -1, 1, (1, 8)),  # two hosts of one slice share its fast links
        (1, -1, None, (1, 8)),
        (-1, 2, None, (4, 2)),
        (8, 1, None, (8, 1)),
    ],
)
def test_mesh_takes_the_sizes_given_and_infers_the_others(
    node: int, device: int, slices: int | None, shape: tuple[int, int]
) -> None:
    mesh = partitioning.make_mesh(node, device, [FakeDevice(i, slices) for i in range(8)])
    assert mesh.axis_names == ("node", "device") and mesh.devices.shape == shape
    assert [d.id for d in mesh.devices.flat] == list(range(8))  # neighbours along `device`


@pytest.mark.parametrize(
    ("node", "device", "words"),
    [
        (3, -1, "mesh.node=3 does not divide the 8 devices"),
        (-1, 5, "mesh.device=5 does not divide the 8 devices"),
        (0, -1, "mesh.node=0 does not divide the 8 devices"),
        (2, 2, "mesh.node=2 x mesh.device=2 is 4 devices, but 8 are present"),
        (4, 8, "is 32 devices, but 8 are present"),
    ],
)
def test_mesh_that_does_not_fit_is_refused_with_numbers(node: int, device: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        partitioning.make_mesh(node, device, EIGHT)


def abstract_mesh(size: int) -> jax.sharding.AbstractMesh:
    return jax.sharding.AbstractMesh((1, size), partitioning.AXES)


@pytest.mark.parametrize(
    ("shape", "names", "spec"),
    [
        ((1024, 64), ("vocab", "embed"), P("device", None)),
        ((1026, 64), ("vocab", "embed"), P(None, "device")),  # 8 does not divide 1026
        ((12, 64, 256), ("layers", "embed", "mlp"), P(None, None, "device")),
        ((12, 256, 64), ("layers", "heads", "embed"), P(None, "device", None)),
        ((63, 65), ("embed", "mlp"), P()),  # nothing divides: whole
        ((64, 63), ("embed", "mlp"), P()),  # below 4,096 scalars: whole
        ((4096,), ("embed",), P("device")),
        ((4095,), ("embed",), P()),
        ((8, 4096), ("layers", "length"), P()),
        ((512, 16), (None, "embed"), P(None, "device")),
    ],
)
def test_first_axis_of_the_rules_that_divides_is_split(
    shape: tuple[int, ...], names: tuple[str | None, ...], spec: P
) -> None:
    assert partitioning.param_spec(shape, names, abstract_mesh(8)) == spec


def test_an_axis_name_without_a_rule_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"\['wdith'\] have no rule.*embed.*vocab"):
        partitioning.param_spec((8, 8), ("wdith", "embed"), abstract_mesh(2))


def test_every_large_parameter_of_roberta_base_is_split_once_and_no_small_one() -> None:
    model = bert.BertModel(bert.BertConfig(pooler=True, norm_order="pre"))
    ids = jnp.zeros((1, 2), jnp.int32)
    boxed = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    shapes = params_lib.flatten(partitioning.unbox(boxed))
    names = params_lib.flatten(jax.tree.map(
        lambda box: box.names, boxed, is_leaf=lambda x: hasattr(x, "names")
    ))  # fmt: skip
    for path, leaf in shapes.items():
        spec = partitioning.param_spec(leaf.shape, names[path], abstract_mesh(8))
        assert list(spec).count("device") == (math.prod(leaf.shape) >= 4096), path
        if names[path][0] == "layers":
            assert len(names[path]) == len(leaf.shape) and (not spec or spec[0] is None)
    split = sum(
        math.prod(leaf.shape)
        for path, leaf in shapes.items()
        if "device" in partitioning.param_spec(leaf.shape, names[path], abstract_mesh(8))
    )
    assert split > 0.999 * params_lib.count(shapes)


def test_constrain_batch_is_nothing_without_a_mesh_or_where_rows_do_not_fit() -> None:
    x = jnp.arange(6.0)
    assert partitioning.constrain_batch(x) is x
    with jax.set_mesh(partitioning.make_mesh(devices=jax.devices()[:1])):
        assert partitioning.constrain_batch(x) is x


SCRIPT = """
import jax, jax.numpy as jnp, numpy as np
from jaxmodels.core import partitioning as p
x = np.arange(48.0).reshape(16, 3)
for node, device in ((1, 8), (2, 4), (8, 1)):
    mesh = p.make_mesh(node, device)
    assert mesh.devices.shape == (node, device)
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: p.constrain_batch(jnp.sin(x)))(x)
        odd = jax.jit(p.constrain_batch)(x[:5])
    assert y.sharding.shard_shape(y.shape) == (2, 3), y.sharding
    np.testing.assert_allclose(y, np.sin(x), rtol=1e-6)
    np.testing.assert_array_equal(odd, x[:5])
    placed = jax.device_put(x, p.batch_sharding(mesh))
    assert placed.addressable_shards[0].data.shape == (2, 3)
    assert jax.device_put(x, p.replicated(mesh)).addressable_shards[0].data.shape == (16, 3)
assert p.make_mesh().devices.shape == (1, 8)
print("done")
"""


def test_batches_are_split_over_eight_devices_with_their_values() -> None:
    done = runs.python("-c", SCRIPT, devices=8)
    assert done.stdout.strip().endswith("done"), done.stderr[-2000:]


def test_shardings_have_the_structure_of_the_unboxed_parameters() -> None:
    layer = bert.MLMHead(vocab_size=512)
    boxed = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 64)))["params"]
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    found = partitioning.param_shardings(boxed | {"plain": np.zeros(3)}, mesh)
    assert jax.tree.structure(found) == jax.tree.structure(
        partitioning.unbox(boxed) | {"plain": np.zeros(3)}
    )
    assert found["decoder"]["kernel"].spec == P(None, "device") and found["plain"].spec == P()
