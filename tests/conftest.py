"""What every test runs under: the CPU by default, a compile cache kept between runs, no leaks."""

# pytest loads tracemalloc to report an error in garbage collection. TFDS imports under a loader of
# its own, which breaks that where it is the first import; so it is loaded here.
import os
import pathlib
import tracemalloc  # noqa: F401
from collections.abc import Iterator
from importlib.metadata import version

# Before jax is imported. JAX_PLATFORMS=cuda (or tpu) runs the same tests on that device.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs that run once on a few numbers need no optimising: BART's gradients compile in half of
# the time. jaxlib 0.10 still has the earlier emitter of CPU kernels: a VCC encoder with gradients
# compiles in 2.4 s, not 6.9 s. Newer releases have the other one alone.
QUICK = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):
    QUICK += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", QUICK)

_ENVIRONMENT = frozenset(os.environ)

import jax  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

ROOT = pathlib.Path(__file__).parents[1]

# Of the 65,530 that Linux allows. A compiled program has some for each of its kernels.
_MOST_MAPS = 15_000

# Settings of jax that tests or the trainer change; each is put back after every test.
_RESTORED = (
    "jax_compilation_cache_dir",
    "jax_debug_nans",
    "jax_default_matmul_precision",
    "jax_disable_jit",
    "jax_enable_x64",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
    "jax_transfer_guard",
)


def pytest_configure(config: pytest.Config) -> None:
    """Keeps compiled programs beside pytest's own cache: a second run compiles nothing again."""
    cache = config.rootpath / ".pytest_cache" / f"jax-{jax.__version__}"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a device that is not here, and says so; no import may set a variable."""
    added = sorted(os.environ.keys() - _ENVIRONMENT - {"PYTEST_CURRENT_TEST"})
    leaked = [name for name in added if name.startswith(("JAX_", "XLA_"))]
    assert not leaked, f"an imported test module sets {leaked} for the processes of all others"
    marked = {name for item in items for name in ("gpu", "tpu") if item.get_closest_marker(name)}
    present = jax.default_backend() if marked else ""
    for item in items:
        for name in marked - {present}:
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=f"needs a {name.upper()}: found {present}"))


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Puts the environment, the working directory and jax's settings back after each test."""
    environment, folder = dict(os.environ), os.getcwd()
    settings = {name: getattr(jax.config, name) for name in _RESTORED}
    yield
    for name, value in settings.items():
        if getattr(jax.config, name) != value:
            jax.config.update(name, value)
            if (
                name == "jax_compilation_cache_dir"
            ):  # an open cache would go on writing to the old one
                compilation_cache.reset_cache()
    os.chdir(folder)
    if dict(os.environ) != environment:
        os.environ.clear()
        os.environ.update(environment)


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
    """Lets compiled programs go before their memory maps reach what Linux allows a process."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > _MOST_MAPS:
        jax.clear_caches()


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """Folder of shared fixtures (`parity/`): ../shared or $JAXMODELS_SHARED; skips without it."""
    folder = pathlib.Path(os.environ.get("JAXMODELS_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared fixtures at {folder}: JAXMODELS_SHARED names another folder")
    return folder


@pytest.fixture(scope="session")
def parity(shared: pathlib.Path) -> pathlib.Path:
    """Folder of the parity cases, one folder a method; skips where it is absent."""
    folder = shared / "parity"
    if not folder.is_dir():
        pytest.skip(f"no parity cases at {folder}")
    return folder
