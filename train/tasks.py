"""Finds the task of a method by name: the one place where the trainer meets a method."""

import importlib
import importlib.util
import pathlib

from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs import names
from jaxmodels.core.task import Task
from train.errors import UsageError


def module_name(method: str) -> str:
    """Returns the module with `make_task`: of a method of jaxmodels, or a dotted path as it is."""
    return method if "." in method else f"jaxmodels.{method}.task"


def known_methods() -> list[str]:
    """Returns the methods of this installation: the folders of jaxmodels with a task.py."""
    spec = importlib.util.find_spec("jaxmodels")
    roots = [] if spec is None else list(spec.submodule_search_locations or [])
    found = {path.parent.name for root in roots for path in pathlib.Path(root).glob("*/task.py")}
    return sorted(found - {"core"})  # core/task.py is the contract itself


def load_task(config: ConfigDict) -> Task:
    """Returns the task that `config` describes.

    Raises:
      UsageError: no such method, or settings that cannot work together.
    """
    name = module_name(config.method)
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        found = None
    if found is None:
        error = names.unknown("method", config.method, known_methods())
        raise UsageError(f"{error} (looked for the module {name})")
    module = importlib.import_module(name)
    if not hasattr(module, "make_task"):
        raise UsageError(f"method={config.method}: {name} has no make_task(config)")
    try:
        return module.make_task(config)
    except ValueError as error:
        raise UsageError(str(error)) from error


def check_mesh(task: Task, mesh: Mesh) -> list[str]:
    """Returns what `task` says of training on `mesh`, see `Task.check_mesh`.

    Raises:
      UsageError: the task refuses the mesh.
    """
    try:
        return task.check_mesh(mesh)
    except ValueError as error:
        raise UsageError(str(error)) from error
