"""What a command does before it touches arrays: caches, worker flags, the mesh, the first line."""

import collections
import os
import pathlib

import jax
from absl import flags as absl_flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxmodels.core import partitioning
from train import cli
from train.errors import UsageError


def start(config: ConfigDict) -> Mesh:
    """Prepares jax for `config` and returns the mesh.

    Raises:
      UsageError: the mesh does not fit the devices, or the batch does not fit the mesh.
    """
    if not absl_flags.FLAGS.is_parsed():
        absl_flags.FLAGS.mark_as_parsed()  # grain's worker processes refuse to start otherwise
    use_compilation_cache(config.compilation_cache)
    try:
        mesh = partitioning.make_mesh(config.mesh.node, config.mesh.device)
    except ValueError as error:
        raise UsageError(str(error)) from error
    cli.check_sizes(config, mesh.size)
    return mesh


def use_compilation_cache(folder: str | None) -> None:
    """Keeps compiled programs in `folder` (None: ~/.cache/jaxmodels/compiled; "off": nowhere).

    A folder that jax was given already (by environment or code) stays where none is named here.
    Anything that took a fifth of a second is kept: jax's own limit of a second misses CPU programs.
    """
    if folder == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    chosen = folder or jax.config.jax_compilation_cache_dir
    if chosen is None:
        home = os.environ.get("XDG_CACHE_HOME", "~/.cache")
        chosen = str(pathlib.Path(home).expanduser() / "jaxmodels" / "compiled")
    jax.config.update("jax_compilation_cache_dir", str(chosen))
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if jax.config.jax_persistent_cache_min_compile_time_secs > 0.2:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def describe(mesh: Mesh) -> str:
    """Returns the devices and the mesh in words: `8 x cpu, mesh node 2 x device 4, jax 0.10.2`."""
    kinds = collections.Counter(device.device_kind for device in mesh.devices.flat)
    devices = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    shape = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{devices}, mesh {shape}{processes}, jax {jax.__version__}"
