"""One side of `benchmarks.load`, in a process of its own: loads a checkpoint once, and tells.

    python -m benchmarks.load_sides SIDE FOLDER SIZE

It imports what the side needs, prints "ready" and its anonymous memory in bytes, waits for a line,
loads, reads one value of every page of the result, and prints JSON. Its parent watches its memory.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# `jax`, `torch` and the readers are imported by the side that uses them: what a side does not need
# is no part of its memory.
SMALL = {"vocab_size": 97, "d_model": 32, "num_layers": 3, "num_heads": 2, "d_ff": 64}
BASE = {"vocab_size": 30522, "d_model": 768, "num_layers": 12, "num_heads": 12, "d_ff": 3072}
SIZES = {"small": SMALL, "base": BASE}
_COMMON: dict[str, Any] = {"max_positions": 512, "num_token_types": 2, "norm_eps": 1e-12}

Load = Callable[[Path], Any]


def template(size: str) -> Any:
    """Returns our boxed tree of shapes for BERT in one of SIZES, with its pooler."""
    import jax
    import jax.numpy as jnp

    from jaxmodels.trunks import bert

    config = bert.BertConfig(**SIZES[size], **_COMMON, position_offset=0, pooler=True)
    ids = jnp.zeros((1, 8), jnp.int32)
    return jax.eval_shape(bert.BertModel(config).init, jax.random.key(0), ids)["params"]


def write_checkpoint(folder: Path, size: str) -> int:
    """Writes model.safetensors (random, Hugging Face's names) and config.json; returns bytes."""
    import jax
    import numpy as np

    from jaxmodels import weights
    from jaxmodels.core import partitioning

    rng, sizes = np.random.default_rng(0), SIZES[size]
    shapes = partitioning.unbox(template(size))
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
    tensors = weights.export_weights(params, weights.hf_bert_rules())
    weights.save_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    config = {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "vocab_size": sizes["vocab_size"],
        "hidden_size": sizes["d_model"],
        "num_hidden_layers": sizes["num_layers"],
        "num_attention_heads": sizes["num_heads"],
        "intermediate_size": sizes["d_ff"],
        "max_position_embeddings": _COMMON["max_positions"],
        "type_vocab_size": _COMMON["num_token_types"],
        "layer_norm_eps": _COMMON["norm_eps"],
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return (folder / "model.safetensors").stat().st_size


def ours(size: str) -> Load:
    """`weights.read` and `import_weights`: checked, stacked, transposed NumPy arrays."""
    from jaxmodels import weights
    from jaxmodels.core import partitioning

    wanted = partitioning.unbox(template(size))

    def load(folder: Path) -> Any:
        tensors = weights.read(folder)
        return weights.import_weights(wanted, tensors, weights.rules_for(tensors, wanted))

    return load


def ours_sharded(size: str) -> Load:
    """`weights.load_sharded`: into JAX arrays split over all devices by our rules."""
    import jax

    from jaxmodels import weights
    from jaxmodels.core import partitioning

    boxed = template(size)
    mesh = partitioning.make_mesh(node=1)
    wanted = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        partitioning.unbox(boxed),
        partitioning.param_shardings(boxed, mesh),
    )

    def load(folder: Path) -> Any:
        tensors = weights.read(folder)
        return weights.load_sharded(wanted, tensors, weights.rules_for(tensors, wanted))

    return load


def naive(size: str) -> Load:
    """`safetensors.numpy.load_file`, then transposed and stacked: written in a hurry."""
    import numpy as np
    from safetensors.numpy import load_file

    def load(folder: Path) -> Any:
        groups: dict[str, list[Any]] = {}
        for name, value in load_file(folder / "model.safetensors").items():
            kernel = value.ndim == 2 and "embeddings" not in name
            group = groups.setdefault(re.sub(r"\.\d+\.", ".*.", name), [])
            group.append(value.T if kernel else value)
        return {name: np.stack(values) for name, values in groups.items()}

    return load


def transformers(size: str) -> Load:
    """`transformers.BertModel.from_pretrained`: a PyTorch module with the file's layout."""
    import torch
    from transformers import BertModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_grad_enabled(False)

    def load(folder: Path) -> Any:
        return BertModel.from_pretrained(folder, local_files_only=True).state_dict()

    return load


SIDES: dict[str, Callable[[str], Load]] = {
    "ours": ours,
    "ours, sharded over 1": ours_sharded,
    "ours, sharded over 8": ours_sharded,
    "safetensors + stack": naive,
    "transformers": transformers,
}


def devices(side: str) -> int:
    """Returns how many simulated devices a side runs on."""
    return 8 if side.endswith("over 8") else 1


def anonymous_bytes(pid: int | str = "self") -> int | None:
    """Returns the memory of a process that no file stands behind; None where Linux is not there."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    found = re.search(r"^RssAnon:\s+(\d+) kB$", text, re.MULTILINE)
    return 1024 * int(found.group(1)) if found else None


def _leaves(tree: Any) -> Iterator[Any]:
    """Yields NumPy views of all arrays; of a JAX array, of its parts on every device."""
    import numpy as np

    for value in tree.values():
        if isinstance(value, dict):
            yield from _leaves(value)
        elif hasattr(value, "addressable_shards"):
            yield from (np.asarray(shard.data) for shard in value.addressable_shards)
        else:
            yield np.asarray(value)


def main(side: str, folder: str, size: str) -> None:
    """Loads once and prints {"seconds", "bytes": of all memory held, "finite": no NaN}."""
    load = SIDES[side](size)
    print(f"ready {anonymous_bytes() or 0}", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    loaded = load(Path(folder))
    # One value of every page of 4 KiB: what only promises to read is made to.
    total = sum(float(leaf.reshape(-1, order="A")[::1024].sum()) for leaf in _leaves(loaded))
    seconds = time.perf_counter() - began
    # By their places: devices that are simulated may share the memory of equal parts.
    held = sum({leaf.ctypes.data: leaf.nbytes for leaf in _leaves(loaded)}.values())
    print(json.dumps({"seconds": seconds, "bytes": held, "finite": total == total}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
