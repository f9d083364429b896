"""Every shared parity file passes, and the command fails where it must."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from .__main__ import main
from .fixtures import adapter, array_error, check, read_case
from .tolerances import Bound, bound

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("JAXMODELS_SHARED", ROOT.parent / "shared"))
METHODS = ("vcc", "mm_cot", "pomp", "aim", "lemda", "smile")
# Others of the same kinds, which compile for seconds each: `make test-long` and the command.
LONG = ("t5_v10", "roberta_all_coarse", "roberta_layer_b16")
OF_SMILE = ("bi_level_drop", "one_level_drop", "router_only", "cost_model", "presets", "drop_rate")


def shared_files() -> list[Path]:
    """Parity files of the methods we have, of the kinds their adapters know."""
    files = []
    for method in METHODS:
        kinds = adapter(method).ADAPTERS
        for path in sorted((SHARED / "parity" / method).glob("*.*")):
            if path.suffix in (".npz", ".json") and read_case(path).kind in kinds:
                files.append(path)
    return files


@pytest.fixture
def quick_compilation() -> Iterator[None]:
    """As in the command: programs that run once on a few numbers need no optimising."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def marked(path: Path) -> Any:
    """The file as a parameter, marked long where others of its kind stand for it."""
    long = path.stem in LONG or (path.parent.name == "smile" and path.stem not in OF_SMILE)
    return pytest.param(path, marks=pytest.mark.long if long else (), id=path.stem)


@pytest.mark.skipif(not shared_files(), reason=f"no shared parity files under {SHARED}")
@pytest.mark.parametrize("path", [marked(path) for path in shared_files()])
def test_shared_file_passes(path: Path, quick_compilation: None) -> None:
    verdict = check(path)
    assert verdict.ok, str(verdict)


META = {
    "kind": "data_span_corruption",
    "tolerance": "exact",
    "config": {
        "tokenizer_len": 100, "input_length": 8, "noise_density": 0.3, "eos": 1, "pad": 0,
        "mean_noise_span_length": 2.0, "vip_id_threshold": "len-20",
    },
}  # fmt: skip


def write(folder: Path, meta: dict[str, Any] = META, **changes: np.ndarray) -> str:
    """A correct small file in `folder`/vcc, with arrays changed or added; returns its path."""
    arrays = {
        "inputs/token_ids": np.array([[10, 11, 12, 13, 14]]),
        "inputs/noise_mask": np.array([[0, 1, 1, 0, 0]]),
        "outputs/input_ids": np.array([[10, 98, 13, 14, 1]]),
        "outputs/labels": np.array([[98, 11, 12, 97, 1]]),
    } | {name.replace("__", "/"): value for name, value in changes.items()}
    path = folder / "vcc" / "case.npz"
    path.parent.mkdir(exist_ok=True)
    np.savez(path, meta=np.array(json.dumps(meta)), **arrays)
    return str(path)


def test_a_correct_file_is_ok(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([write(tmp_path)]) == 0
    assert capsys.readouterr().out == "ok vcc/case 0.0e+00\n"


def test_one_wrong_number_fails_and_is_named(tmp_path: Path, capsys: Any) -> None:
    wrong = write(tmp_path, outputs__labels=np.array([[98, 11, 12, 97, 2]]))
    assert main([wrong]) == 1
    assert capsys.readouterr().out == "FAIL vcc/case inf (outputs/labels)\n"


def test_a_slightly_wrong_float_fails(tmp_path: Path, capsys: Any) -> None:
    table = np.array([[8, 0.3, 2, 8, 4, 2, 1]], np.float32)
    right = check(Path(write(tmp_path, outputs__length_table=table)))
    assert right.ok, right
    table[0, 3] += 1e-3
    assert main([write(tmp_path, outputs__length_table=table)]) == 1
    assert "(outputs/length_table)" in capsys.readouterr().out


def test_an_output_nobody_computes_fails(tmp_path: Path, capsys: Any) -> None:
    assert main([write(tmp_path, outputs__novel=np.zeros(2))]) == 1
    assert "not computed: outputs/novel" in capsys.readouterr().out


def test_another_shape_fails(tmp_path: Path, capsys: Any) -> None:
    assert main([write(tmp_path, outputs__labels=np.array([[98, 11]]))]) == 1
    assert "outputs/labels, shape (1, 5) against (1, 2)" in capsys.readouterr().out


def test_one_bad_file_fails_the_run_but_hides_no_other(tmp_path: Path, capsys: Any) -> None:
    good = write(tmp_path)
    assert main([str(tmp_path / "vcc" / "absent.npz"), good]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("FAIL vcc/absent FileNotFoundError") and lines[1].startswith("ok")


def test_unknown_kind_method_and_format_fail(tmp_path: Path, capsys: Any) -> None:
    assert main([write(tmp_path, meta=META | {"kind": "sonnets"})]) == 1
    assert "unknown kind 'sonnets'" in capsys.readouterr().out
    (tmp_path / "vcc").rename(tmp_path / "fixtures")
    assert main([str(tmp_path / "fixtures" / "case.npz")]) == 1
    assert "unknown method 'fixtures'" in capsys.readouterr().out
    for name, content in (("a.npz", "text"), ("a.json", "[]"), ("a.txt", ""), ("b.json", "{}")):
        (tmp_path / name).write_text(content)
        assert main([str(tmp_path / name)]) == 1, name
        assert capsys.readouterr().out.startswith("FAIL")


def test_a_file_with_nothing_to_compare_fails(tmp_path: Path) -> None:
    path = tmp_path / "vcc" / "empty.npz"
    path.parent.mkdir()
    with np.load(write(tmp_path)) as stored:
        kept = {name: stored[name] for name in stored.files if not name.startswith("outputs/")}
    np.savez(path, **kept)
    assert "nothing to compare" in str(check(path))


def test_references_inside_a_json_document_are_compared_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, path = adapter("vcc"), tmp_path / "vcc" / "case.json"
    path.parent.mkdir()
    expected = {"sums": lambda case: {"outputs/sum": np.asarray(case.meta["sum"])}}
    monkeypatch.setattr(module, "EXPECTED", expected, raising=False)
    monkeypatch.setitem(module.ADAPTERS, "sums", lambda case: {"outputs/sum": sum(case.meta["of"])})
    for wanted, ok in ((5, True), (6, False)):
        path.write_text(json.dumps({"kind": "sums", "of": [2, 3], "sum": wanted}))
        assert check(path).ok == ok, wanted


def test_no_files_is_a_usage_error_of_the_command() -> None:
    run = subprocess.run([sys.executable, "-m", "tests.parity"], cwd=ROOT, capture_output=True)
    assert run.returncode == 2 and b"usage" in run.stdout


@pytest.mark.parametrize(
    ("given", "name", "wanted"),
    [
        ({"tolerance": 3e-4}, "outputs/x", (0, 3e-4)),
        ({"tol": 2e-3}, "grads/x", (0, 2e-3)),
        ({}, "outputs/x", (0, 1e-5)),
        ({"tolerance": {"forward": 1e-6, "grad": 1e-4}}, "grads/params/w", (0, 1e-4)),
        ({"tolerance": {"forward": 1e-6, "grad": 1e-4}}, "outputs/layer0/c", (0, 1e-6)),
        ({"tolerance": {"loss": 1e-2, "forward": 1e-6}}, "outputs/loss", (0, 1e-2)),
        ({"tolerance": {"forward": 1e-6}}, "grads/x", (0, 1e-5)),
        ({"tolerance": "exact for integers, 1e-6 for probabilities"}, "outputs/p", (0, 1e-6)),
        ({"tolerance": "exact"}, "outputs/p", (0, 0)),
        ({"tol": "abs 2e-4 (of 1; 1e-5 typical)"}, "outputs/x", (2e-4, 0)),
        ({"tol": "exact gather (1e-6)"}, "outputs/x", (0, 1e-6)),
        ({"tol": "5e-5 abs on features, 5e-3 on logits (scale 100)"}, "outputs/logits", (5e-3, 0)),
        ({"tol": "5e-5 abs on features, 5e-3 on logits"}, "outputs/embed", (5e-5, 0)),
        ({"tol": "atol 2e-5 rtol 3e-5 in float32"}, "outputs/x", (2e-5, 3e-5)),
        ({"tol": {"atol": 1e-6, "rtol": 1e-4, "grad_atol": 2e-6}}, "outputs/x", (1e-6, 1e-4)),
        ({"tol": {"atol": 1e-6, "grad_atol": 2e-6, "grad_rtol": 1e-3}}, "grads/x", (2e-6, 1e-3)),
        ({"tol": {"hidden_states": "abs 2e-4"}}, "outputs/encoder_hidden_states.0", (2e-4, 0)),
        ({"tol": {"grads": "rel 1e-3 of the maximum"}}, "grads/shared.weight", (0, 1e-3)),
    ],
)
def test_tolerances_are_read_from_the_file(
    given: dict, name: str, wanted: tuple[float, float]
) -> None:
    assert bound(given, name) == Bound(*wanted)


def test_an_absolute_bound_is_absolute_whatever_the_scale() -> None:
    assert Bound(absolute=1e-3).allows(error=9e-5, scale=10.0)
    assert not Bound(absolute=1e-3).allows(error=2e-4, scale=10.0)
    assert Bound(absolute=1e-3, relative=1e-4).allows(error=2e-4, scale=10.0)


def test_rules_of_comparison() -> None:
    a = np.array([[1, 2], [3, 4]])
    assert array_error(a[:, ::-1], a, "set") == 0.0
    assert array_error(a[::-1], a, "set") == np.inf
    assert array_error(np.array([1e-5]), np.array([3e-7]), "near_zero") == 0.0
    assert array_error(np.array([1e-3]), np.array([3e-7]), "near_zero") == np.inf
    assert array_error(np.array([1.0, 2.2]), np.array([1.0, 2.0]), "relative") == pytest.approx(0.1)
    assert array_error(np.array([np.nan]), np.array([1.0]), "relative") == np.inf
