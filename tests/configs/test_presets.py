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
    if path.stem not in ("__init__", "fields", "names")
)


def plain(settings: Any) -> dict[str, Any]:
    """Settings by dotted name as JSON values."""
    return json.loads(json.dumps(fields.flat(settings)))


def resolved(name: str) -> dict[str, Any]:
    """The defaults of a file of configs/, and what each preset sets otherwise."""
    module = importlib.import_module(f"configs.{name}")
    defaults = plain({name: field.default for name, field in module.FIELDS.items()})
    presets = {
        preset: {k: v for k, v in plain(module.get_config(preset)).items() if v != defaults[k]}
        for preset in module.PRESETS
    }
    return {"defaults": defaults, "presets": presets}


@pytest.mark.parametrize("name", CONFIGS)
def test_presets_resolve_to_what_was_recorded(name: str) -> None:
    path = GOLDEN / f"{name}.json"
    assert path.exists(), f"{path.name} is missing: python -m tests.configs.test_presets"
    found, recorded = resolved(name), json.loads(path.read_text())
    assert found["defaults"] == recorded["defaults"]
    assert found["presets"].keys() == recorded["presets"].keys()
    for preset, values in found["presets"].items():
        assert values == recorded["presets"][preset], preset


def test_no_recorded_file_has_gone() -> None:
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_docstring_starts_with_the_command_and_names_every_preset(name: str) -> None:
    module = importlib.import_module(f"configs.{name}")
    assert f"python -m train.main --config=configs/{name}.py:quickstart" in module.__doc__
    for preset in module.PRESETS:
        assert f"\n  {preset} " in module.__doc__, preset
        method = module.get_config(preset).method  # a method may have several files
        assert name == method or name.startswith(f"{method}_")
    assert module.get_config() == module.get_config("quickstart")


if __name__ == "__main__":
    for old in GOLDEN.glob("*.json"):
        old.unlink()
    for config in CONFIGS:
        text = json.dumps(resolved(config), indent=1) + "\n"
        (GOLDEN / f"{config}.json").write_text(text)
