"""What import-linter cannot say: private and banned modules, optional packages, methods by name."""

import ast
import configparser
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LIBRARY = ("jaxmodels", "kernels_pallas", "train", "configs")
BANNED = ("flax.nnx", "jax._src", "jax.interpreters", "tensorflow", "clu")
# Installed with the `data`, `docs` and `test` extras, or by the trainer only.
OPTIONAL = (
    *("grain", "tensorflow_datasets", "array_record", "tokenizers", "safetensors"),
    *("ml_collections", "orbax", "tensorboardX", "absl", "matplotlib", "torch", "transformers"),
    *("ftfy", "regex", "PIL"),
)
# Loaded by flax and optax themselves, so they cannot be blocked while `import jaxmodels` runs.
NEEDED_BY_FLAX = ("orbax", "absl")
KERNELS_MAY_IMPORT = {"jax", "jaxlib", "numpy", "chex", "kernels_pallas", *sys.stdlib_module_names}
# Modules here may import optional packages at their top, if nobody imports them at its own top.
LEAVES = ("jaxmodels.data", "jaxmodels.weights")


def _sources(*folders: str) -> list[pathlib.Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def _module(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(node: ast.AST, path: pathlib.Path) -> list[str]:
    """Full names that one import statement may load; the names of a `from` import in full too."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    folder = ".".join(path.relative_to(ROOT).parent.parts)
    above = folder.split(".")[: len(folder.split(".")) - node.level + 1] if node.level else []
    base = ".".join([*above, *filter(None, [node.module])])
    return [base, *(f"{base}.{alias.name}" for alias in node.names)]


def _inside(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def _at_top(tree: ast.Module) -> list[ast.AST]:
    """Statements that run on import: everything outside functions and `if TYPE_CHECKING`."""
    found, pending = [], list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        found.append(node)
        pending.extend(child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt))
    return found


def _imports(*folders: str) -> list[tuple[str, str]]:
    """(place, module) for every import under these folders, wherever it stands."""
    return [
        (f"{path.relative_to(ROOT)}:{node.lineno}", name)
        for path in _sources(*folders)
        for node in ast.walk(ast.parse(path.read_text()))
        for name in _imported(node, path)
    ]


def _methods() -> list[str]:
    folders = {path.parent.name for path in ROOT.glob("jaxmodels/*/task.py")}
    return sorted(folders - {"core"})  # core/task.py defines the contract


def _contracts() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_no_private_deprecated_or_tensorflow_module_is_imported():
    found = [
        f"{place} {name}"
        for place, name in _imports(*LIBRARY, "benchmarks", "tests")
        if _inside(name, BANNED)
    ]
    assert not found


def test_no_private_jax_module_is_reached_through_an_attribute():
    pattern = re.compile(r"\b(jax\._src|flax\.nnx|nnx\.)")
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in _sources(*LIBRARY, "benchmarks")
        for match in pattern.finditer(path.read_text())
    ]
    assert not found


def test_kernels_import_only_jax_numpy_and_chex():
    found = [
        f"{place} {name}"
        for place, name in _imports("kernels_pallas")
        if name.split(".")[0] not in KERNELS_MAY_IMPORT
    ]
    assert not found


def test_every_method_is_named_in_the_contracts():
    contracts = _contracts()
    floors = contracts["importlinter:contract:floors"]["layers"].split("\n")
    top = [name.strip(" ()") for name in floors[1].split("|")]
    unnamed = contracts["importlinter:contract:trainer-names-no-method"]
    trainer = unnamed["forbidden_modules"].split()
    for method in _methods():
        assert method in top, f"setup.cfg: add `| {method}` to the first layer of `floors`"
        assert f"jaxmodels.{method}" in trainer, f"setup.cfg: {method} in trainer-names-no-method"


def test_the_trainer_names_no_method_even_in_a_string():
    names = "|".join(_methods()) or "(?!)"  # which matches nothing
    pattern = re.compile(rf"\b({names})\b", re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}: {node.value!r}"
        for path in _sources("train")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        # Docstrings and help texts may show an example command.
        and "--config" not in node.value
        and pattern.search(node.value)
    ]
    assert not found


def test_modules_that_need_optional_packages_are_leaves():
    """A module of data/ or weights/ that needs one at its top is imported inside functions only."""
    needy = set()
    for path in _sources(*(leaf.replace(".", "/") for leaf in LEAVES)):
        names = [n for node in _at_top(ast.parse(path.read_text())) for n in _imported(node, path)]
        if any(_inside(name, OPTIONAL) for name in names):
            needy.add(_module(path))
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} {name}"
        for path in _sources("jaxmodels")
        for node in _at_top(ast.parse(path.read_text()))
        for name in _imported(node, path)
        if name in needy and _module(path) not in needy
    ]
    assert not found


_IMPORT_ALL = """
import importlib, sys, traceback
import jax, flax.linen, optax, chex, numpy
optional, modules = sys.argv[1].split(","), sys.argv[2:]
for name in [name for name in sys.modules if name.split(".")[0] in optional]:
    del sys.modules[name]

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in optional:
            raise ModuleNotFoundError(f"{name} is optional and blocked by this test", name=name)

sys.meta_path.insert(0, Blocker())
failed = 0
for name in modules:
    try:
        importlib.import_module(name)
    except Exception:
        failed += 1
        print(name, traceback.format_exc(limit=-2))
sys.exit(failed)
"""


def test_the_library_imports_with_only_jax_flax_optax_chex_and_numpy():
    names = [_module(path) for path in _sources("jaxmodels", "kernels_pallas")]
    modules = [name for name in names if not _inside(name, LEAVES) and "__main__" not in name]
    optional = ",".join(name for name in OPTIONAL if name not in NEEDED_BY_FLAX)
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT_ALL, optional, "jaxmodels", *modules],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("package", NEEDED_BY_FLAX)
def test_the_library_itself_does_not_import_what_only_flax_needs(package):
    """These come with flax and cannot be blocked: read the sources instead."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} {name}"
        for path in _sources("jaxmodels", "kernels_pallas")
        if not _inside(_module(path), LEAVES)
        for node in _at_top(ast.parse(path.read_text()))
        for name in _imported(node, path)
        if _inside(name, (package,))
    ]
    assert not found
