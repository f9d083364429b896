"""Settings and meshes that cannot work are refused before anything is compiled."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from jaxmodels.core import partitioning
from jaxmodels.smile import Grid, MoeConfig, grid, moe
from tests.smile import small


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_experts": 6}, r"num_experts=6.*n=2 nodes x m=2 devices = 4"),
        ({"num_experts": 0}, "num_experts=0"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0"),
        ({"capacity_factor": float("nan")}, "capacity_factor=nan"),
        ({"capacity_factor_intra": -1.0}, "capacity_factor=-1.0"),
        ({"transport": "flat"}, "routing='bi_level'.*'flat'"),
        ({"transport": "two_hop", "capacity_factor": None}, "None means dropless"),
        ({"routing": "three_level"}, "three_level.*bi_level"),
        ({"transport": "pigeon"}, "pigeon.*two_hop"),
        ({"intra_router": "own"}, "per_node"),
        ({"stats": "batch"}, "global"),
        ({"activation": "swish"}, "swish"),
        ({"jitter": 1.0}, "jitter=1.0"),
        ({"buffer_factor": 0.0}, "buffer_factor=0.0"),
        ({"d_ff": 0}, "d_ff=0"),
        ({"chunks": 0}, "chunks=0"),
        ({"min_capacity": 0}, "minimum capacity 0"),
    ],
)
def test_settings_that_cannot_work_say_what_does(changes: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        small.config(**changes)


def test_chunks_that_do_not_divide_the_tokens_are_refused() -> None:
    config = small.config(chunks=5)
    with pytest.raises(ValueError, match="chunks=5 does not divide the 12 tokens"):
        moe.apply(small.params(config), small.tokens(config), config)


def test_a_grid_without_devices_is_refused() -> None:
    with pytest.raises(ValueError, match="0 nodes"):
        Grid(0, 4)


def test_capacities_of_both_levels_are_relative_to_the_tokens_of_a_device() -> None:
    config = small.config(capacity_factor=1.0)
    assert config.capacities(16) == (8, 4)  # m e C2 slots a device and expert: those of one level
    one = dataclasses.replace(config, routing="one_level")
    assert one.capacities(16) == (2,)
    assert config.experts_per_node * 4 == one.num_experts * 2
    assert config.capacities(16, training=False) == (16, 8)


def abstract_mesh(node: int, device: int, names: tuple[str, ...] = partitioning.AXES):
    return AbstractMesh((node, device), names, axis_types=(AxisType.Auto,) * 2)


def test_auto_takes_two_hops_only_across_nodes() -> None:
    one, two = small.config(routing="one_level"), small.config()
    assert one.resolved_transport() == "flat" and two.resolved_transport() == "two_hop"
    for sizes, wanted in (((2, 2), "two_hop"), ((1, 4), "flat"), ((4, 1), "flat")):
        with jax.sharding.use_abstract_mesh(abstract_mesh(*sizes)):
            assert one.resolved_transport() == wanted
            assert one.explained_transport()[1].startswith("auto: ")
    assert dataclasses.replace(one, transport="flat").explained_transport() == ("flat", "as set")
    dropless = small.config(capacity_factor=None)
    assert dropless.resolved_transport() == "ragged"
    assert dropless.resolved_transport(training=False) == "two_hop"


def test_a_mesh_that_does_not_divide_the_grid_is_refused_by_name() -> None:
    with jax.sharding.use_abstract_mesh(abstract_mesh(4, 2)):
        with pytest.raises(ValueError, match="n=2 nodes.*node=4 must divide 2"):
            grid.placement(Grid(2, 2))


def test_a_mesh_without_our_axes_is_refused() -> None:
    with jax.sharding.use_abstract_mesh(abstract_mesh(2, 2, ("data", "device"))):
        with pytest.raises(ValueError, match=r"lacks \['node'\]"):
            grid.placement(Grid(2, 2))


def test_tokens_that_do_not_fit_the_grid_are_refused() -> None:
    config = small.config()
    with pytest.raises(ValueError, match=r"\[n, m, tokens, d\] with n=2, m=2"):
        moe.apply(small.params(config), jnp.zeros((4, 12, small.D)), config)


def test_jitter_without_a_key_is_refused() -> None:
    config = small.config(jitter=0.01)
    with pytest.raises(ValueError, match="rng"):
        moe.apply(small.params(config), small.tokens(config), config, deterministic=False)


def mesh_of(owners: list[list[int]], platform: str, attribute: str):
    devices = np.array(
        [
            [
                types.SimpleNamespace(id=10 * i + j, platform=platform, **{attribute: owner})
                for j, owner in enumerate(row)
            ]
            for i, row in enumerate(owners)
        ],
        dtype=object,
    )
    return types.SimpleNamespace(devices=devices, shape={"node": len(owners)})


@pytest.mark.parametrize(
    ("platform", "attribute", "what"),
    [("tpu", "slice_index", "slice"), ("gpu", "process_index", "host")],
)
def test_a_node_that_mixes_slices_or_hosts_is_refused(platform, attribute, what) -> None:
    mixed = mesh_of([[0, 0], [1, 0]], platform, attribute)
    with pytest.raises(ValueError, match=rf"node 1.*{what} \{{10: 1, 11: 0\}}"):
        grid.check_nodes(mixed)
    grid.check_nodes(mixed, allow_mixed=True)
    grid.check_nodes(mesh_of([[0, 0], [1, 1]], platform, attribute))


def test_experts_are_split_over_the_whole_mesh_and_routers_repeated() -> None:
    mesh = abstract_mesh(2, 4)
    spec = partitioning.param_spec((8, 16, 32), ("expert", "embed", "mlp"), mesh)
    assert spec == jax.sharding.PartitionSpec(("node", "device"), None, None)
    uneven = partitioning.param_spec((6, 64, 128), ("expert", "embed", "mlp"), mesh)
    assert uneven == jax.sharding.PartitionSpec(None, None, "device")
    assert isinstance(MoeConfig(8, 4), MoeConfig)
