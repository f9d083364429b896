"""Published weights as a run's first parameters: what the file has is placed, the rest is fresh."""

import contextlib
import hashlib
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from jaxmodels import weights
from jaxmodels.core import manifest
from jaxmodels.core import params as params_lib
from jaxmodels.weights.converted import RECORD
from train import checkpoint, init_rows, storage
from train.errors import UsageError

Tree = Any
TRUNK = "trunk"
_SHOWN = 5  # leaves named in a message
_COMPARED = 1 << 20  # bytes at either end of a weights file


class Published(NamedTuple):
    """Published weights in their places.

    Attributes:
      placed: {path of a parameter: its published values, placed}.
      line: says so, for the screen.
      digest: differs where other weights were read: processes compare theirs.
      tables: {path of a table with fewer rows than the model's: its published rows}.
      fills: {path of such a table: what its further rows are, see `init_rows`}.
    """

    placed: dict[str, jax.Array]
    line: str
    digest: str
    tables: Mapping[str, jax.Array] = {}
    fills: Mapping[str, str] = {}


class _Source(NamedTuple):
    """Weights that were opened: `leaves` {path: shape and dtype}, `load` reads {path: struct}."""

    leaves: Mapping[str, Any]
    family: str
    digest: str
    load: Callable[[dict[str, Any]], Mapping[str, Any]]
    left: tuple[str, ...] = ()


def load(path: epath.PathLike, abstract: Tree, rows: Sequence[str] = ()) -> Published:
    """Returns the published weights, placed as the model's parameters are.

    The weights' tree is matched at the root of the parameters, or under `trunk/`: wherever more of
    its leaves are. All names and shapes are compared before a value is read. Of a run of ours whose
    heads are others than the model's, the trunk alone is taken.

    Args:
      path: a folder that `python -m jaxmodels.weights convert` wrote, a weights file or model
        folder of a known family, or a run of ours (its workdir, or a checkpoint).
      abstract: shape structs with shardings, from `state.abstract_params`.
      rows: tables whose further rows the file lacks, as "LEAF=FILL"; see `init_rows.chosen`.

    Raises:
      UsageError: nothing usable is there; or a leaf of the file has no place in the model, or
        another shape.
    """
    with _told(path):
        model = params_lib.flatten(abstract)
        source = _open(path, model)
        leaves = source.leaves
        root = _root(leaves, model)
        fills = init_rows.chosen(rows, list(leaves))
        _compare(leaves, model, root, fills)
        wanted = {
            name: _whole(leaf, model[root + name]) if name in fills else model[root + name]
            for name, leaf in leaves.items()
        }
        read = {root + name: leaf for name, leaf in source.load(wanted).items()}
    fills = {root + name: fill for name, fill in fills.items()}
    placed = {name: leaf for name, leaf in read.items() if name not in fills}
    where = f"under {root[:-1]}" if root else "at the root"
    said = [f"init_from {path} ({source.family}): {len(placed)} parameters {where}"]
    if fills:
        rows = [f"{n} {len(read[n])} -> {model[n].shape[0]} ({fill})" for n, fill in fills.items()]
        said.append(f"rows: {_some(rows)}")
    for what, names in (
        ("stay fresh", sorted(model.keys() - read.keys())), ("are left out", source.left)
    ):  # fmt: skip
        if names:
            said.append(f"{len(names)} {what}: {_some(names)}")
    tables = {name: read[name] for name in fills}
    return Published(placed, "; ".join(said), source.digest, tables, fills)


def _open(path: epath.PathLike, model: Mapping[str, Any]) -> _Source:
    place = storage.absolute(path)
    if weights.is_converted(place):
        converted = weights.open_converted(place)
        # Its record, which names the weights' own digest: orbax's files differ each time.
        digest = manifest.read(place).files[RECORD][1]
        return _Source(converted.leaves, converted.family, digest, _flat(converted.load))
    if (place / checkpoint.FOLDER).exists() or (place / manifest.NAME).exists():
        return _open_run(place, model)
    file = weights.read(place)
    detected = weights.detect(file)
    rules = detected.rules(file)
    leaves = params_lib.flatten(weights.tree_of(file, rules))
    load = _flat(lambda wanted: weights.load_sharded(wanted, file, rules))
    return _Source(leaves, detected.name, _digest(file.paths), load)


def _open_run(place: epath.Path, model: Mapping[str, Any]) -> _Source:
    stored = checkpoint.open_params(place)
    leaves = stored.structs
    left: list[str] = []
    if not leaves.keys() <= model.keys():
        left = sorted(name for name in leaves if not name.startswith(f"{TRUNK}/"))
    kept = {name: leaf for name, leaf in leaves.items() if name not in left}

    def load(wanted: dict[str, Any]) -> dict[str, Any]:
        found = stored.load({**leaves, **wanted})
        return {name: found[name] for name in kept}

    digest = manifest.read(stored.place).digest
    return _Source(kept, f"step {stored.step} of a run", digest, load, tuple(left))


def _flat(load: Callable[[Tree], Tree]) -> Callable[[dict[str, Any]], Mapping[str, Any]]:
    return lambda wanted: params_lib.flatten(load(params_lib.unflatten(wanted)))


def filled(params: Tree, found: Published) -> Tree:
    """Returns `params` with what was found in place of its own."""
    own = params_lib.flatten(params)
    tables = init_rows.fill_up(found.tables, found.fills, own)
    return params_lib.unflatten({**own, **found.placed, **tables})


def _whole(leaf: Any, wanted: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Returns what a table is read as before its rows are filled up: its own shape, unsplit."""
    sharding = wanted.sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return jax.ShapeDtypeStruct(tuple(leaf.shape), wanted.dtype, sharding=sharding)


def _digest(paths: Sequence[pathlib.Path]) -> str:
    """Returns a SHA-256 of the files' names, sizes and ends: a process reads only its shards."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(_COMPARED))
            file.seek(max(size - _COMPARED, 0))
            digest.update(file.read(_COMPARED))
    return digest.hexdigest()


@contextlib.contextmanager
def _told(path: epath.PathLike) -> Iterator[None]:
    """Tells every error of the weights in one line that names the setting."""
    try:
        yield
    except weights.WeightsError as error:
        summary, *problems = str(error).split("\n  ")
        text = " ".join([summary, *problems[:_SHOWN]])
        more = f" (and {len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""
        raise UsageError(f"init_from={path}: {' '.join(text.split())}{more}") from error


def _root(leaves: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """Returns the beginning of the model's paths under which more of `leaves` are found."""
    return max(("", f"{TRUNK}/"), key=lambda root: sum(root + name in model for name in leaves))


def _compare(
    leaves: Mapping[str, Any], model: Mapping[str, Any], root: str, fills: Mapping[str, str]
) -> None:
    absent = sorted(name for name in leaves if root + name not in model)
    if absent:
        headed = any(name.startswith(f"{TRUNK}/") for name in leaves)
        hint = " (to take a trunk without its heads: weights convert --part trunk)" * headed
        raise weights.WeightsError(
            f"{len(absent)} of {len(leaves)} leaves have no place in the model: "
            f"{_some(absent)}{hint}; the model has {_some(sorted(model))}"
        )
    differ, longer = [], []
    for name, leaf in sorted(leaves.items()):
        shape, wanted = tuple(leaf.shape), tuple(model[root + name].shape)
        if name in fills:
            if fills[name] != "new":
                init_rows.check_shape(name, shape, wanted)
        elif shape != wanted:
            differ.append(f"{root}{name} is {list(shape)}, wanted {list(wanted)}")
            if len(shape) == len(wanted) == 2 and shape[0] < wanted[0] and shape[1] == wanted[1]:
                longer.append(name)
    hint = f"; --config.init_rows={longer[0]}=repeat|fresh|new fills up a table" if longer else ""
    if differ:
        raise weights.WeightsError(f"weights of another size: {_some(differ, '; ')}{hint}")


def _some(names: list[str], separator: str = ", ") -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return separator.join(names[:_SHOWN]) + more
