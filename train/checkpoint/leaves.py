"""The leaves of a state as orbax takes them, named by path, and back, bit by bit.

Three items: `params` (the trainable ones), `frozen`, and `training` (all else). Orbax refuses
leaves of no elements and takes a millisecond for each of the others: those without elements, and
the small ones where there are very many, travel as the bytes of one array, `%packed`.
"""

import functools
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.core import params as params_lib
from train.state import TrainState

Tree = Any
Leaves = dict[str, Any]
PACKED = "%packed"  # no name of a leaf: there % is followed by two digits, or stands alone
MANY = 1000  # leaves in an item, above which small ones are packed
SMALL = 4096  # bytes
_REFUSED = ("uint2", "uint4", "int2")  # by TensorStore
_IMPLEMENTATIONS = {"fry": "threefry2x32", "rbg": "rbg", "urbg": "unsafe_rbg"}


def named(tree: Tree) -> Leaves:
    """Returns {path: leaf}, parts joined by "/" and all but letters, digits, _ and - in % codes."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(map(_part, path)) or "%": leaf for path, leaf in leaves}


def describe(leaf: Any) -> str:
    """Returns dtype and shape: `float32[3,4]`, `key<fry>[]`."""
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def struct(text: str) -> jax.ShapeDtypeStruct:
    """Returns the shape struct of a text by `describe`.

    Raises:
      ValueError: it is of a type that no parameter has, such as a random key.
    """
    dtype, _, sizes = text.removesuffix("]").partition("[")
    if dtype.startswith("key<"):
        raise ValueError(f"{text}: a random key is no parameter")
    shape = tuple(int(size) for size in sizes.split(",") if size)
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def items(state: TrainState) -> dict[str, Leaves]:
    """Returns {item: {path: leaf}} of a state, of arrays or shape structs."""
    rest = {"opt_state": state.opt_state, "step": state.step, "rng": state.rng}
    return {
        "params": named(state.trainable),
        "frozen": named(state.frozen),
        "training": named(rest),
    }


def assemble(plan: TrainState, found: Mapping[str, Leaves]) -> TrainState:
    """Puts leaves back into a state with the structure of `plan`."""
    rest = {"opt_state": plan.opt_state, "step": plan.step, "rng": plan.rng}
    rest = fill(rest, found["training"])
    return TrainState(
        fill(plan.trainable, found["params"]), fill(plan.frozen, found["frozen"]), **rest
    )


def fill(tree: Tree, found: Leaves) -> Tree:
    """Returns `tree` with the leaves of `found` in place of its own."""
    return jax.tree.unflatten(jax.tree.structure(tree), [found[name] for name in named(tree)])


def pack(leaves: Leaves) -> tuple[Tree, list[str]]:
    """Returns (the nested dict for orbax, the names of the leaves in its `%packed`)."""
    small = {name: leaf for name, leaf in leaves.items() if _packs(leaf, len(leaves))}
    values = jax.device_get([_plain(leaf) for leaf in small.values()])
    data = b"".join(np.asarray(value).tobytes() for value in values)
    stored = {name: _plain(leaf) for name, leaf in leaves.items() if name not in small}
    tree = params_lib.unflatten(stored)
    return tree | ({PACKED: np.frombuffer(data, np.uint8)} if data else {}), list(small)


def stored_tree(wanted: Leaves, picked: Sequence[str]) -> Tree:
    """Returns what orbax is to read: shape structs with shardings, and the packed bytes."""
    structs = {name: _plain_struct(leaf) for name, leaf in wanted.items()}
    size = sum(_bytes(structs.pop(name)) for name in picked)
    tree = params_lib.unflatten(structs)
    return tree | ({PACKED: np.empty(size, np.uint8)} if size else {})


def unpack(tree: Tree, wanted: Leaves, picked: Sequence[str]) -> Leaves:
    """Returns {path: leaf}, each as and where `wanted` says, of what orbax read."""
    data = tree.pop(PACKED, np.empty(0, np.uint8))
    found, start = params_lib.flatten(tree), 0
    values, shardings = [], []
    for name in picked:
        struct = _plain_struct(wanted[name])
        end = start + _bytes(struct)
        values.append(np.frombuffer(data[start:end].tobytes(), struct.dtype).reshape(struct.shape))
        shardings.append(struct.sharding)
        start = end
    found |= zip(picked, _place(values, shardings), strict=True)
    return {name: _as_key(found[name], leaf) for name, leaf in wanted.items()}


@functools.lru_cache(100_000)
def _part(key: Any) -> str:
    text = jax.tree_util.keystr((key,), simple=True)
    return urllib.parse.quote(text, safe="").replace(".", "%2E").replace("~", "%7E") or "%"


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _packs(leaf: Any, leaves: int) -> bool:
    """Whether it is packed; the same on every process, as their shapes and shardings are."""
    size = int(np.prod(leaf.shape, dtype=np.int64))
    if size == 0:
        return True
    if not getattr(leaf, "is_fully_replicated", True):
        return False
    return str(leaf.dtype) in _REFUSED or (leaves > MANY and _bytes(leaf) <= SMALL)


def _plain(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _plain_struct(leaf: Any) -> jax.ShapeDtypeStruct:
    plain = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(plain.shape, plain.dtype, sharding=sharding)


def _as_key(found: Any, wanted: Any) -> Any:
    if not _is_key(wanted):
        return found
    kind = str(wanted.dtype).removeprefix("key<").removesuffix(">")
    return jax.random.wrap_key_data(found, impl=_IMPLEMENTATIONS[kind])


def _bytes(leaf: Any) -> int:
    size = 64 if _is_key(leaf) else np.dtype(leaf.dtype).itemsize  # a key: of each kind, less
    return int(np.prod(leaf.shape, dtype=np.int64)) * size


def _place(values: list[Any], shardings: list[Any]) -> list[jax.Array]:
    if jax.process_count() == 1:
        return jax.device_put(values, shardings)
    return [
        jax.make_array_from_callback(value.shape, sharding, value.__getitem__)
        for value, sharding in zip(values, shardings, strict=True)
    ]
