"""Checkpoints, by orbax: the one file that knows it.

A step's folder holds three items: `params` (the whole parameter tree, whatever is frozen),
`training` (optimiser state, step, random key) and `progress` (data position and clocks, a JSON
file a process). Weights alone are read from the first, with no need of the others.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jaxmodels.core import params as params_lib
from train import state as state_lib
from train.errors import UsageError
from train.state import Layout, TrainState

Tree = Any
FOLDER = "checkpoints"
_SHOWN = 10  # differing leaves listed


class Checkpoints:
    """The checkpoints of one run: written in the background, the newest `keep` kept."""

    def __init__(self, workdir: epath.PathLike, keep: int = 3):
        """Opens `workdir/checkpoints`, making it where it does not exist."""
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(
            epath.Path(workdir).resolve() / FOLDER, options=options, item_handlers=_handlers()
        )

    def latest_step(self) -> int | None:
        """Returns the step of the newest checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, progress: Mapping[str, Any]) -> None:
        """Starts to save `state` and this process's `progress`; the state may be donated next."""
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            training=ocp.args.StandardSave(_training_items(state)),
            progress=_SaveProgress(dict(progress)),
        )
        self._manager.save(int(jax.device_get(state.step)), args=args)

    def restore(self, plan: Layout, step: int) -> tuple[TrainState, dict[str, Any]]:
        """Returns the state and the progress of `step`, straight onto the mesh of `plan`.

        Raises:
          UsageError: the checkpoint's leaves differ from the plan's; they are listed by path.
        """
        params, training = plan.abstract.params, _training_items(plan.abstract)
        for item, wanted in (("params", params), ("training", training)):
            check_same(_stored(self._manager, step, item), wanted, f"checkpoint {step}, {item}")
        args = ocp.args.Composite(
            params=ocp.args.StandardRestore(params),
            training=ocp.args.StandardRestore(training),
            progress=_RestoreProgress(),
        )
        found = self._manager.restore(step, args=args)
        return _assemble(plan, found["params"], found["training"]), found["progress"]

    def wait(self) -> None:
        """Returns when what was saved is on disk; raises what its writing met."""
        self._manager.wait_until_finished()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        """Waits for the writers and releases them."""
        self._manager.close()


def load_params(path: epath.PathLike, abstract: Tree, step: int | None = None) -> tuple[Tree, int]:
    """Returns (parameters, their step) of a run or a single checkpoint, placed as `abstract` says.

    Args:
      path: a workdir, its folder of checkpoints, or the folder of one step.
      abstract: shape structs with shardings, from `state.abstract_params`.
      step: which one; the newest by default.

    Raises:
      UsageError: nothing is there, or names, shapes or types differ (all are listed).
    """
    folder, step = find(path, step)
    place = folder / str(step)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**_handlers())) as reader:
        stored = params_lib.flatten(reader.metadata(place).item_metadata["params"].tree)
        check_same(stored, abstract, f"checkpoint {place}")
        wanted = ocp.args.Composite(params=ocp.args.StandardRestore(abstract))
        return reader.restore(place, args=wanted)["params"], step


def find(path: epath.PathLike, step: int | None = None) -> tuple[epath.Path, int]:
    """Returns the folder of checkpoints that `path` means, and the step: `step` or the newest.

    Raises:
      UsageError: no checkpoint is there, or not of that step.
    """
    path = epath.Path(path).expanduser().resolve()
    if path.name.isdigit() and (path / "params").exists():
        return path.parent, int(path.name)
    folder = path / FOLDER if (path / FOLDER).exists() else path
    steps = ocp.utils.checkpoint_steps(folder) if folder.exists() else []
    if not steps:
        raise UsageError(f"{path}: no checkpoint there (wanted: the --workdir of a run)")
    if step is not None and step not in steps:
        raise UsageError(f"{path}: no checkpoint of step {step}; there are {sorted(steps)}")
    return folder, max(steps) if step is None else step


def check_same(stored: Mapping[str, Any], wanted: Tree, what: str) -> None:
    """Compares stored leaves with wanted ones by path, shape and dtype.

    Args:
      stored: {path: something with shape and dtype}.
      wanted: nested dict of the same.
      what: names the stored ones in the message.

    Raises:
      UsageError: they differ; every kind of difference is listed.
    """
    wanted = params_lib.flatten(wanted)
    lines = [
        f"missing {path} {_leaf(wanted[path])}" for path in sorted(wanted.keys() - stored.keys())
    ]
    lines += [
        f"unexpected {path} {_leaf(stored[path])}" for path in sorted(stored.keys() - wanted.keys())
    ]
    lines += [
        f"{path} is {_leaf(stored[path])}, wanted {_leaf(leaf)}"
        for path, leaf in sorted(wanted.items())
        if path in stored and _leaf(stored[path]) != _leaf(leaf)
    ]
    if lines:
        more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        raise UsageError(
            f"{what} is of another model or optimiser: {'; '.join(lines[:_SHOWN])}{more}"
        )


def _leaf(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


def _handlers() -> dict[str, Any]:
    return {
        "params": ocp.StandardCheckpointHandler(),
        "training": ocp.StandardCheckpointHandler(),
        "progress": _ProgressHandler(),
    }


def _training_items(state: TrainState) -> dict[str, Any]:
    """The state without its parameters, as nested dicts named by path: no optax type is stored."""
    slots = {f"opt_state/{name}": leaf for name, leaf in _named(state.opt_state)}
    key = jax.eval_shape(jax.random.key_data, state.rng)
    if isinstance(state.rng, jax.ShapeDtypeStruct):
        rng = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=state.rng.sharding)
    else:
        rng = jax.random.key_data(state.rng)
    return params_lib.unflatten(slots | {"step": state.step, "rng": rng})


def _named(tree: Tree) -> list[tuple[str, Any]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def _assemble(plan: Layout, params: Tree, training: Tree) -> TrainState:
    """Puts stored items back into the shape of `plan`."""
    trainable, frozen = state_lib.split(params, plan.groups)
    found = params_lib.flatten(training)
    slots = [found[f"opt_state/{name}"] for name, _ in _named(plan.abstract.opt_state)]
    opt_state = jax.tree.unflatten(jax.tree.structure(plan.abstract.opt_state), slots)
    rng = jax.random.wrap_key_data(found["rng"])
    return TrainState(trainable, frozen, opt_state, found["step"], rng)


def _stored(manager: ocp.CheckpointManager, step: int, item: str) -> dict[str, Any]:
    """What the checkpoint says of its leaves, without reading them."""
    return params_lib.flatten(manager.item_metadata(step)[item].tree)


class _ProgressHandler(ocp.CheckpointHandler):
    """Keeps one JSON file a process: each has its own place in the data."""

    def save(self, directory: epath.Path, args: "_SaveProgress") -> None:
        (directory / _process_file()).write_text(json.dumps(args.item))

    def restore(self, directory: epath.Path, args: "_RestoreProgress") -> dict[str, Any]:
        path = directory / _process_file()
        if not path.exists():
            raise UsageError(f"{path}: absent; the run was saved by another number of processes")
        return json.loads(path.read_text())


@ocp.args.register_with_handler(_ProgressHandler, for_save=True)
@dataclasses.dataclass
class _SaveProgress(ocp.args.CheckpointArgs):
    item: dict[str, Any]


@ocp.args.register_with_handler(_ProgressHandler, for_restore=True)
@dataclasses.dataclass
class _RestoreProgress(ocp.args.CheckpointArgs):
    pass


def _process_file() -> str:
    return f"process_{jax.process_index()}_of_{jax.process_count()}.json"
