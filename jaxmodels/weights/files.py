"""Opens a weights file of any accepted kind, told by its content and never by its name alone."""

from __future__ import annotations

import os
import pathlib
import struct
from typing import Any

from jaxmodels.weights import npz_file, safetensors_file, torch_zip
from jaxmodels.weights.tensor_file import Entry, TensorFile, WeightsError
from jaxmodels.weights.zip_archive import open_archive

_MAX_INDEX_BYTES = 64 * 2**20
_MAX_CONFIG_BYTES = 2**20
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

_ACCEPTED = (
    ".safetensors, its .index.json, the zip files of torch.save and torch.jit.save, NumPy's .npz"
)
# First bytes of what may look like weights.
_REFUSED = {
    b"\x93NUM": "a NumPy file of one array, which has no name: np.savez gives it one",
    b"\x89HDF": "an HDF5 file (Keras, TensorFlow): save its arrays with np.savez",
    b"GGUF": "a GGUF file, whose numbers are quantised",
    b"PK\x05\x06": "a zip file without members",
    b"\x1f\x8b\x08\x00": "a gzip file: unpack it first",
    b"\x1f\x8b\x08\x08": "a gzip file: unpack it first",
    b"": "an empty file",
}


def read(path: str | os.PathLike[str]) -> TensorFile:
    """Opens weights of any accepted kind, which is told by the content.

    Accepted: .safetensors, a shard index (.index.json) and its shards, the zip files of torch.save
    and of torch.jit.save (OpenAI's CLIP), NumPy's .npz (ViT), and a model folder of Hugging Face.
    Headers are checked in full; values are read when asked for. No pickled code is ever run. The
    result's `config` is what `config.json` beside the file says, or empty.

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
    tensors = _read_index(path) if _kind(path) == "index" else _read_single(path)
    tensors.config = _config_beside(path)
    tensors.paths = (path, *tensors.paths)
    return tensors


def _config_beside(path: pathlib.Path) -> dict[str, Any]:
    config = path.parent / "config.json"
    if not config.is_file():
        return {}
    if config.stat().st_size > _MAX_CONFIG_BYTES:
        raise WeightsError(f"{config}: more than {_MAX_CONFIG_BYTES} bytes: refused.")
    return safetensors_file.parse_json_object(config.read_bytes(), f"{config}: the settings")


def _read_single(path: pathlib.Path) -> TensorFile:
    kind = _kind(path)
    if kind == "safetensors":
        return safetensors_file.read_safetensors(path)
    if kind == "zip":
        return _read_zip(path)
    raise WeightsError(f"{path}: a shard index in place of a weights file.")


def _read_zip(path: pathlib.Path) -> TensorFile:
    try:
        names = list(open_archive(path).members)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    arrays = [name for name in names if name.endswith(".npy")]
    # A data.pkl decides, as PyTorch's: its files hold members of any name.
    is_torch = any(name.split("/")[1:] == ["data.pkl"] for name in names)
    return npz_file.read_npz(path) if arrays and not is_torch else torch_zip.read_torch(path)


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
    what = _REFUSED.get(head[:4], f"an unknown format (first bytes {head[:8]!r})")
    raise WeightsError(f"{path}: {what}. Accepted: {_ACCEPTED}.")


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
    tensors = TensorFile(str(path), {key: entries[key] for key in weight_map})
    tensors.paths = tuple(path.parent / name for name in names)
    return tensors


def _is_plain(name: str) -> bool:
    """Tells whether `name` can only mean a file beside the index."""
    return bool(name) and not name.startswith(".") and not set(name) & set("/\\:\0")
