"""Converted checkpoints: published weights as an orbax checkpoint of our tree, proven whole.

OUT/params/        the tree, as orbax writes it
OUT/model.json     family, settings, where the weights come from, every leaf
OUT/manifest.json  SHA-256 of every file; written last: without it the folder does not count
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxmodels.core import manifest
from jaxmodels.core import params as params_lib
from jaxmodels.weights import families, files, importing
from jaxmodels.weights import orbax_arrays as arrays_lib
from jaxmodels.weights.exporting import export_weights
from jaxmodels.weights.rules import Rules
from jaxmodels.weights.safetensors_file import parse_json_object
from jaxmodels.weights.tensor_file import Entry, TensorFile, WeightsError

ARRAYS = "params"
RECORD = "model.json"
FORMAT = 1
_CHUNK = 4 << 20


@dataclasses.dataclass(frozen=True)
class Converted:
    """A converted checkpoint, opened: what it holds, and how to load it.

    Attributes:
      path: its folder, an `etils.epath.Path`.
      family: name of the family it was made from.
      settings: fields of the trunk's config, as far as the weights told them.
      part: the subtree that was kept, or "" for all.
      leaves: {our path: shape and dtype}.
      source: the foreign keys, shapes and dtypes, without values, and `config`.
    """

    path: Any
    family: str
    settings: dict[str, Any]
    part: str
    leaves: dict[str, jax.ShapeDtypeStruct]
    source: TensorFile

    @property
    def rules(self) -> Rules:
        """The table by which it was read, remade from the recorded keys."""
        return families.family_named(self.family).rules(self.source)

    def load(self, template: Any = None) -> Any:
        """Returns the parameters, cast and placed as `template` says.

        Args:
          template: nested dict of `jax.ShapeDtypeStruct`, with shardings; every leaf of the
            checkpoint is in it. None: NumPy arrays as stored.

        Raises:
          WeightsError: a file was altered since it was written, or cannot be read.
        """
        self._check_whole()
        wanted = params_lib.flatten(template) if template is not None else self.leaves
        try:
            return arrays_lib.read(self.path / ARRAYS, params_lib.unflatten(wanted))
        except (ValueError, OSError, KeyError) as error:
            raise WeightsError(f"{self.path}: {manifest.one_line(error)}") from error

    def _check_whole(self) -> None:
        try:
            manifest.verify(self.path, manifest.read(self.path))
        except manifest.Damaged as error:
            raise WeightsError(f"{self.path} is damaged: {error}; convert it again.") from error


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    family: str | None = None,
    dtype: Any = None,
    part: str = "",
    force: bool = False,
) -> Converted:
    """Reads published weights and writes them as a checkpoint of our tree, leaf by leaf.

    Each leaf is read, encoded and written before the next: host memory holds two copies of the
    largest one, and some 100 MB that the C library's allocator keeps for the writing threads.

    Args:
      source: what `read` takes.
      out: a folder that does not exist.
      family: name of the family; None: told from the keys.
      dtype: of the floating-point leaves; None: as in the file.
      part: keep only this subtree, as the root: "trunk" of a model with heads.
      force: replace `out` if it exists.

    Raises:
      WeightsError: the file cannot be read, does not fit its family, or `out` exists. `out` is
        then as it was before.
    """
    out = pathlib.Path(out)
    check_absent(out, force)
    file = files.read(source)
    chosen = families.family_named(family) if family else families.detect(file)
    rules = chosen.rules(file)
    sources = importing.leaf_sources(importing.tree_of(file, rules), file, rules, dtype=dtype)
    sources = _part_of(sources, part)
    record = {
        "format": FORMAT,
        "library": f"jaxmodels {_version()}",
        "family": chosen.name,
        "settings": families.settings_of(chosen, file),
        "part": part,
        "leaves": {
            path: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
            for path, leaf in sorted(sources.items())
        },
        "source": {
            "name": pathlib.Path(source).name,
            "sha256": {path.name: _sha256(path) for path in file.paths},
            "config": file.config,
            "tensors": {key: [str(file.dtype(key)), list(file.shape(key))] for key in file},
        },
    }
    _write(out, record, sources)
    return open_converted(out)


def export_converted(checkpoint: Converted, dtype: Any = None) -> dict[str, np.ndarray]:
    """Returns {foreign key: array} of a converted checkpoint, under the names it came with.

    A tied tensor comes once, under the first of its names: see `export_weights`.

    Args:
      checkpoint: as `open_converted` returned it; one of a `part` belongs back under it.
      dtype: of the floating-point tensors; None: as stored.

    Raises:
      WeightsError: damaged, or its table no longer fits it.
    """
    wanted = {
        path: jax.ShapeDtypeStruct(
            leaf.shape,
            dtype if dtype is not None and importing.is_float(leaf.dtype) else leaf.dtype,
        )
        for path, leaf in checkpoint.leaves.items()
    }
    loaded = params_lib.flatten(checkpoint.load(params_lib.unflatten(wanted)))
    start = f"{checkpoint.part}/" if checkpoint.part else ""
    tree = params_lib.unflatten({start + path: leaf for path, leaf in loaded.items()})
    return export_weights(tree, checkpoint.rules)


def check_absent(out: pathlib.Path, force: bool) -> None:
    """Raises WeightsError where `out` exists and may not be replaced, or has no folder to be in."""
    if not out.parent.is_dir():
        raise WeightsError(f"{out}: there is no folder {out.parent}.")
    if (out.exists() or out.is_symlink()) and not force:
        raise WeightsError(f"{out} exists: choose another name, or give --force to replace it.")


def is_converted(path: str | os.PathLike[str]) -> bool:
    """Tells whether `path` is a folder that `convert` wrote."""
    from etils import epath

    return (epath.Path(path) / RECORD).exists()


def open_converted(path: str | os.PathLike[str]) -> Converted:
    """Opens the folder that `convert` wrote, without reading its arrays.

    Raises:
      WeightsError: it is none, it is not complete, or its record was altered.
    """
    from etils import epath

    path = epath.Path(path)
    try:
        manifest.verify(path, manifest.read(path), (RECORD,))
    except manifest.Damaged as error:
        raise WeightsError(f"{path} is no whole converted checkpoint: {error}.") from error
    except manifest.NewerFormat as error:
        raise WeightsError(str(error)) from error
    record = parse_json_object((path / RECORD).read_bytes(), f"{path / RECORD}: the record")
    if record.get("format") != FORMAT:
        raise WeightsError(f"{path / RECORD}: format {record.get('format')!r}, not {FORMAT}.")
    try:
        leaves = {
            name: jax.ShapeDtypeStruct(tuple(leaf["shape"]), _dtype(leaf["dtype"]))
            for name, leaf in record["leaves"].items()
        }
        tensors = {
            key: Entry(tuple(shape), _dtype(dtype), _no_values)
            for key, (dtype, shape) in record["source"]["tensors"].items()
        }
        source = TensorFile(record["source"]["name"], tensors)
        source.config = record["source"]["config"]
        return Converted(path, record["family"], record["settings"], record["part"], leaves, source)
    except (KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path / RECORD}: not as written ({error!r}).") from error


def _no_values() -> np.ndarray:
    raise WeightsError("only keys and shapes of the original file are recorded, no values.")


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


def _part_of(sources: dict[str, Any], part: str) -> dict[str, Any]:
    if not part:
        return sources
    kept = {p[len(part) + 1 :]: s for p, s in sources.items() if p.startswith(f"{part}/")}
    if not kept:
        tops = sorted({path.split("/")[0] for path in sources})
        raise WeightsError(f"part {part!r} holds nothing; the tree has {', '.join(tops)}.")
    return kept


def _write(out: pathlib.Path, record: Mapping[str, Any], sources: Mapping[str, Any]) -> None:
    """Writes beside `out` under another name, and gives it the name when all is there."""
    from etils import epath

    temporary = pathlib.Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.partial-"))
    try:
        arrays_lib.write(temporary / ARRAYS, params_lib.unflatten(sources))
        (temporary / RECORD).write_text(json.dumps(record, indent=1))
        manifest.write(epath.Path(temporary), {"kind": "converted weights"})
        temporary.chmod(0o755)
        replace_folder(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_folder(new: pathlib.Path, out: pathlib.Path) -> None:
    """Gives `new` the name `out`; what had it before goes only after that has succeeded."""
    if not out.exists():
        new.rename(out)
        return
    aside = pathlib.Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.old-"))
    out.rename(aside / out.name)
    try:
        new.rename(out)
    except BaseException:
        (aside / out.name).rename(out)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _sha256(path: pathlib.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _version() -> str:
    try:
        return importlib.metadata.version("jaxmodels")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return "(not installed)"
