"""Opens a weights file of any accepted kind, told by its content and never by its name alone."""

from __future__ import annotations

import os
import pathlib
import struct

from jaxmodels.weights import safetensors_file, torch_zip
from jaxmodels.weights.tensor_file import Entry, TensorFile, WeightsError

_MAX_INDEX_BYTES = 64 * 2**20
# What a model folder of Hugging Face holds, best first.
_IN_FOLDER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_CONVERT = (
    "Convert it where you trust it: load it with PyTorch, then "
    "safetensors.torch.save_file(state_dict, 'model.safetensors')."
)


def read(path: str | os.PathLike[str]) -> TensorFile:
    """Opens weights: .safetensors, a shard index (.index.json), a torch.save zip, a model folder.

    Headers are checked in full; values are read when asked for. No pickled code is ever run.

    Raises:
      WeightsError: absent, of another kind (the message says how to convert it), or damaged.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        names = [name for name in _IN_FOLDER if (path / name).is_file()]
        if not names:
            raise WeightsError(f"{path}: the folder holds none of {', '.join(_IN_FOLDER)}.")
        path = path / names[0]
    if not path.is_file():
        raise WeightsError(f"{path}: no such file.")
    return _read_index(path) if _kind(path) == "index" else _read_single(path)


def _read_single(path: pathlib.Path) -> TensorFile:
    kind = _kind(path)
    if kind == "safetensors":
        return safetensors_file.read_safetensors(path)
    if kind == "zip":
        return torch_zip.read_torch(path)
    raise WeightsError(f"{path}: a shard index in place of a weights file.")


def _kind(path: pathlib.Path) -> str:
    """Returns "safetensors", "zip" or "index" from the first bytes; refuses the rest."""
    with path.open("rb") as file:
        head = file.read(512)
    if head[:4] == b"PK\x03\x04":
        return "zip"
    # A length field and then JSON; in text the "length" would be astronomically large.
    if head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= 2**40:
        return "safetensors"
    if head.lstrip()[:1] == b"{":
        return "index"
    if head[:1] == b"\x80" or head[:2] in (b"(d", b"cc", b"ct"):
        raise WeightsError(f"{path}: a plain pickle, which could run code: refused. {_CONVERT}")
    if head[257:262] == b"ustar":
        raise WeightsError(f"{path}: a tar file of an old PyTorch: refused. {_CONVERT}")
    known = {b"\x93NUM": "a NumPy file", b"\x89HDF": "an HDF5 file", b"": "an empty file"}
    what = known.get(head[:4], f"an unknown format (first bytes {head[:8]!r})")
    raise WeightsError(
        f"{path}: {what}. Accepted: .safetensors, its .index.json, and torch.save's zip files."
    )


def _read_index(path: pathlib.Path) -> TensorFile:
    """Opens all shards named by an index; every fault is listed before any value is read."""
    if path.stat().st_size > _MAX_INDEX_BYTES:
        raise WeightsError(f"{path}: an index of more than {_MAX_INDEX_BYTES} bytes: refused.")
    index = safetensors_file.parse_json_object(path.read_bytes(), f"{path}: the index")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{path}: JSON, but no shard index: it has no 'weight_map' object.")
    names = list(dict.fromkeys(map(str, weight_map.values())))
    problems = [f"{name!r} is not a plain file name" for name in names if not _is_plain(name)]
    problems += [
        f"shard {name!r} is absent"
        for name in names
        if _is_plain(name) and not (path.parent / name).is_file()
    ]
    if problems:
        raise WeightsError(f"{path}: the index names files that cannot be read.", problems)
    entries: dict[str, Entry] = {}
    for name in names:
        shard = _read_single(path.parent / name)
        promised = {key for key, value in weight_map.items() if value == name}
        problems += [f"{key!r} is not in shard {name!r}" for key in sorted(promised - shard.keys())]
        problems += [f"{key!r} of {name!r} is not in the index" for key in shard.keys() - promised]
        entries.update({key: shard.entry(key) for key in shard})
    if problems:
        raise WeightsError(f"{path}: the index and its shards disagree.", problems)
    return TensorFile(str(path), {key: entries[key] for key in weight_map})


def _is_plain(name: str) -> bool:
    """Tells whether `name` can only mean a file beside the index."""
    return bool(name) and not name.startswith(".") and not set(name) & set("/\\:\0")
