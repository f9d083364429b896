"""Published weights as a run's first parameters: what the file has is placed, the rest is fresh."""

import contextlib
import hashlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from jaxmodels import weights
from jaxmodels.core import manifest
from jaxmodels.core import params as params_lib
from jaxmodels.weights.converted import RECORD
from train import storage
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
    """

    placed: dict[str, jax.Array]
    line: str
    digest: str


def load(path: epath.PathLike, abstract: Tree) -> Published:
    """Returns the published weights, placed as the model's parameters are.

    The weights' tree is matched at the root of the parameters, or under `trunk/`: wherever more of
    its leaves are. All names and shapes are compared before a value is read.

    Args:
      path: a folder that `python -m jaxmodels.weights convert` wrote, or a weights file or model
        folder of a known family.
      abstract: shape structs with shardings, from `state.abstract_params`.

    Raises:
      UsageError: nothing usable is there; or a leaf of the file has no place in the model, or
        another shape.
    """
    with _told(path):
        place = storage.absolute(path)
        converted = weights.open_converted(place) if weights.is_converted(place) else None
        if converted:
            leaves, family = converted.leaves, converted.family
            # Its record, which names the weights' own digest: orbax's files differ each time.
            digest = manifest.read(place).files[RECORD][1]
        else:
            file = weights.read(place)
            detected = weights.detect(file)
            rules, family = detected.rules(file), detected.name
            leaves = params_lib.flatten(weights.tree_of(file, rules))
            digest = _digest(file.paths)
        model = params_lib.flatten(abstract)
        root = _root(leaves, model)
        _compare(leaves, model, root)
        wanted = params_lib.unflatten({name: model[root + name] for name in leaves})
        found = converted.load(wanted) if converted else weights.load_sharded(wanted, file, rules)
    placed = {root + name: leaf for name, leaf in params_lib.flatten(found).items()}
    fresh = sorted(model.keys() - placed.keys())
    where = f"under {root[:-1]}" if root else "at the root"
    rest = f"; {len(fresh)} stay fresh: {_some(fresh)}" if fresh else ""
    line = f"init_from {path} ({family}): {len(placed)} parameters {where}{rest}"
    return Published(placed, line, digest)


def filled(params: Tree, placed: Mapping[str, jax.Array]) -> Tree:
    """Returns `params` with the leaves of `placed` in place of its own."""
    return params_lib.unflatten({**params_lib.flatten(params), **placed})


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


def _compare(leaves: Mapping[str, Any], model: Mapping[str, Any], root: str) -> None:
    absent = sorted(name for name in leaves if root + name not in model)
    if absent:
        headed = any(name.startswith(f"{TRUNK}/") for name in leaves)
        hint = " (to take a trunk without its heads: weights convert --part trunk)" * headed
        raise weights.WeightsError(
            f"{len(absent)} of {len(leaves)} leaves have no place in the model: "
            f"{_some(absent)}{hint}; the model has {_some(sorted(model))}"
        )
    differ = [
        f"{root}{name} is {list(leaf.shape)}, wanted {list(model[root + name].shape)}"
        for name, leaf in sorted(leaves.items())
        if tuple(leaf.shape) != tuple(model[root + name].shape)
    ]
    if differ:
        raise weights.WeightsError(f"weights of another size: {_some(differ, '; ')}")


def _some(names: list[str], separator: str = ", ") -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return separator.join(names[:_SHOWN]) + more
