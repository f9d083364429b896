"""Weights & Biases, for those who name a project in `config.wandb`: imported only then.

One run of ours is one run there, however often it is restarted: its id is kept in the workdir.
The step is an axis of our own. W&B's internal one drops whatever comes again after a restart from
an earlier checkpoint; here it only counts the calls.
"""

import importlib.util
import json
import secrets
import tempfile
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from configs.fields import flat
from train import storage
from train.errors import UsageError
from train.redact import redact_values
from train.storage import Say

FILE = "wandb_run_id.json"
_STEP = "step"


def check(config: ConfigDict) -> None:
    """Sees to it that W&B can be used, where `config.wandb` asks for it.

    Raises:
      UsageError: the package is not installed.
    """
    if config.wandb is not None:
        _package()


class WeightsAndBiases:
    """Numbers of a run as a W&B run; offline and disabled modes are W&B's own ($WANDB_MODE)."""

    def __init__(self, workdir: epath.Path, config: ConfigDict, say: Say = print):
        """Starts the W&B run, or continues the one that this workdir has had.

        Args:
          workdir: of the run.
          config: `config.wandb` names the project, as PROJECT or ENTITY/PROJECT. All of it is sent,
            without secrets.
          say: takes a line with the run's address.

        Raises:
          UsageError: the package is not installed, or nobody is logged in.
          Exception: whatever else W&B raises; the run can go on without it.
        """
        wandb = _package()
        entity, _, project = config.wandb.rpartition("/")
        try:
            self._run = wandb.init(
                project=project,
                entity=entity or None,
                id=_run_id(workdir),
                resume="allow",
                name=workdir.name,
                config=redact_values(flat(config)),
                dir=tempfile.gettempdir() if storage.is_remote(workdir) else str(workdir),
                settings=_settings(wandb),
            )
        except Exception as error:
            if type(error).__name__ in ("UsageError", "AuthenticationError"):
                raise UsageError(
                    f"wandb={config.wandb}: {storage.describe(error)}; run `wandb login`, or set "
                    f"WANDB_MODE=offline"
                ) from error
            raise
        self._run.define_metric(_STEP)
        self._run.define_metric("*", step_metric=_STEP)
        self._logged = _logged_step(self._run)
        say(f"Weights & Biases: {getattr(self._run, 'url', None) or 'offline'}")

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Logs one point of each value, unless an earlier start has logged that step already."""
        if step >= self._logged:
            self._run.log(
                {f"{split}/{name}": value for name, value in values.items()} | {_STEP: step}
            )

    def flush(self) -> None:
        """Nothing to do: W&B sends by itself."""

    def close(self) -> None:
        """Sends what is left; returns when that is done."""
        self._run.finish()


def _package() -> ModuleType:
    found = importlib.util.find_spec("wandb")
    if found is not None:
        import wandb

        if hasattr(wandb, "init"):  # a folder `wandb/` of an offline run is no package
            return wandb
    raise UsageError("config.wandb is set, but wandb is not installed: pip install wandb")


def _settings(wandb: ModuleType) -> Any:
    """Keeps what W&B would collect besides to a minimum: command lines may hold secrets."""
    try:
        return wandb.Settings(console="off", disable_git=True, save_code=False, x_disable_meta=True)
    except Exception:  # the names of settings change between versions
        return wandb.Settings(console="off")


def _run_id(workdir: epath.Path) -> str:
    """The id of this workdir's W&B run; drawn and written down at the first start."""
    path = workdir / FILE
    try:
        return str(json.loads(path.read_text())["id"])
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is damaged; remove it to begin a new W&B run") from error
    drawn = secrets.token_hex(8)
    storage.write(path, json.dumps({"id": drawn}) + "\n")
    return drawn


def _logged_step(run: Any) -> int:
    """The last step that the W&B run holds, from earlier starts; -1 for none."""
    try:
        return int(run.summary.get(_STEP, -1))
    except (AttributeError, TypeError, ValueError):
        return -1
