"""Loads a file of some 180 MB onto simulated devices and prints what that took, as JSON.

    python -m tests.weights.sharded_script FILE sharded|whole|convert OUT

`whole` is the way that is not taken: everything on the host, each leaf copied, then onto the
devices.
"""

import json
import pathlib
import sys
import threading
import time

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxmodels import weights
from jaxmodels.core import params as params_lib
from jaxmodels.weights import families
from jaxmodels.weights.rules import Rule, dense, packed
from jaxmodels.weights.transforms import TRANSPOSE

# Most leaves are just below 32 MiB: freed blocks of that size are what the C library likes to keep.
WIDTH, INNER, LAYERS, ROWS = 1024, 2048, 7, 7168
SHAPES = {"wte": (ROWS, WIDTH)}
for layer in range(LAYERS):
    SHAPES |= {f"h.{layer}.qkv": (3 * WIDTH, WIDTH), f"h.{layer}.fc.weight": (INNER, WIDTH)}
QKV = [f"layers/attention/{name}/kernel" for name in ("query", "key", "value")]
RULES = [
    Rule("wte", "embedding"),
    *packed("h.{i}.qkv", QKV, TRANSPOSE),
    # The largest comes last: all else is placed when its shards are read.
    *dense("h.{i}.fc", "layers/ffn", bias=False),
]
# Each tensor a leaf of its own: the largest is a sixth of the file.
FLAT = [Rule(name, name.replace(".", "/"), TRANSPOSE) for name in SHAPES]
SPECS = {"embedding": (("node", "device"),)}


def tensors() -> dict[str, np.ndarray]:
    """The file's tensors, 177 MB of float32."""
    rng = np.random.default_rng(0)
    return {name: rng.random(shape, np.float32) for name, shape in SHAPES.items()}


def anonymous_bytes() -> int:
    """What this process holds in memory that no file backs."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


class Peak:
    """The largest `anonymous_bytes` while it is open, above that at its start."""

    def __enter__(self) -> "Peak":
        self._start, self.bytes, self._stop = anonymous_bytes(), 0, False
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop:
            self.bytes = max(self.bytes, anonymous_bytes() - self._start)
            time.sleep(0.001)

    def __exit__(self, *_: object) -> None:
        self._stop = True
        self._thread.join()


def template(file: weights.TensorFile) -> dict:
    """The tree: on one device, or with two shards a leaf, each on four devices, or with eight."""
    nodes = (jax.device_count() + 1) // 2
    mesh = jax.make_mesh((nodes, jax.device_count() // nodes), ("node", "device"))
    leaves = params_lib.flatten(weights.tree_of(file, RULES))

    def struct(path: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = SPECS.get(path, (None, "device"))
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return params_lib.unflatten({path: struct(path, leaf) for path, leaf in leaves.items()})


def main() -> None:
    """Runs one of the ways and prints what it took."""
    file = weights.read(sys.argv[1])
    if sys.argv[2] == "convert":
        family = families.Family("big", lambda file: 2, lambda file: FLAT, lambda file: {})
        families.known_families = lambda: {"big": family}
        import orbax.checkpoint  # noqa: F401 - its own size is none of the conversion's

        with Peak() as peak:
            made = weights.convert(sys.argv[1], sys.argv[3])
        largest = max(leaf.size * leaf.dtype.itemsize for leaf in made.leaves.values())
        print(json.dumps({"peak": peak.bytes, "largest_leaf": largest}))
        return
    wanted = template(file)
    # What the first placement sets up for good is none of the load's.
    jax.block_until_ready(jax.device_put(np.ones((8, 8), np.float32), wanted["embedding"].sharding))
    with Peak() as peak:
        if sys.argv[2] == "sharded":
            params = weights.load_sharded(wanted, file, RULES)
        else:
            host = weights.import_weights(wanted, file, RULES)
            params = jax.tree.map(lambda x, s: jax.device_put(x + 0, s.sharding), host, wanted)
            jax.block_until_ready(params)
    shards = [s.data for leaf in jax.tree.leaves(params) for s in leaf.addressable_shards]
    # Copies of a shard that share their memory are there once.
    placed_bytes = sum({s.unsafe_buffer_pointer(): s.nbytes for s in shards}.values())
    largest = max(s.nbytes for s in shards)
    host = weights.import_weights(wanted, file, RULES)
    same = jax.tree.map(lambda x, y: np.asarray(x).tobytes() == y.tobytes(), params, host)
    placed = jax.tree.map(lambda x, s: x.sharding == s.sharding, params, wanted)
    # The memory is the file's reader's, and shared by copies: nobody may write into it.
    grown = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(params)
    added = jax.tree.map(lambda x, y: np.array_equal(x, y + 1), grown, host)
    report = {"peak": peak.bytes, "placed": placed_bytes, "largest_shard": largest}
    report |= {"equal": all(jax.tree.leaves(same)), "sharded": all(jax.tree.leaves(placed))}
    report["donated"] = all(jax.tree.leaves(added))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
