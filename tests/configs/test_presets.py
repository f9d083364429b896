"""Resolved presets against recorded ones: no default moves unseen.

    python -m tests.configs.test_presets

writes the files of golden/ anew; do so, and say why in the commit, when a change is meant.
"""

import importlib
import json
import pathlib
from typing import Any

import pytest

from configs import fields

GOLDEN = pathlib.Path(__file__).with_name("golden")
CONFIGS = sorted(
    path.stem
    for path in pathlib.Path(fields.__file__).parent.glob("*.py")
    if path.stem not in ("__init__", "fields")
)


def presets() -> list[tuple[str, str]]:
    """(file of configs/, preset) of every preset."""
    modules = ((name, importlib.import_module(f"configs.{name}")) for name in CONFIGS)
    return [(name, preset) for name, module in modules for preset in module.PRESETS]


def resolved(name: str, preset: str) -> dict[str, Any]:
    """Every setting of a preset by dotted name, as JSON values."""
    config = importlib.import_module(f"configs.{name}").get_config(preset)
    return json.loads(json.dumps(fields.flat(config)))


@pytest.mark.parametrize(("name", "preset"), presets())
def test_preset_resolves_to_what_was_recorded(name: str, preset: str) -> None:
    path = GOLDEN / f"{name}_{preset}.json"
    assert path.exists(), f"{path.name} is missing: python -m tests.configs.test_presets"
    assert resolved(name, preset) == json.loads(path.read_text())


def test_no_recorded_preset_has_gone() -> None:
    assert {path.stem for path in GOLDEN.glob("*.json")} == {f"{n}_{p}" for n, p in presets()}


@pytest.mark.parametrize("name", CONFIGS)
def test_docstring_starts_with_the_command_and_names_every_preset(name: str) -> None:
    module = importlib.import_module(f"configs.{name}")
    assert f"python -m train.main --config=configs/{name}.py:quickstart" in module.__doc__
    for preset in module.PRESETS:
        assert f"\n  {preset} " in module.__doc__, preset
        assert module.get_config(preset).method == name
    assert module.get_config() == module.get_config("quickstart")


if __name__ == "__main__":
    for old in GOLDEN.glob("*.json"):
        old.unlink()
    for pair in presets():
        text = json.dumps(resolved(*pair), indent=1) + "\n"
        (GOLDEN / f"{'_'.join(pair)}.json").write_text(text)
