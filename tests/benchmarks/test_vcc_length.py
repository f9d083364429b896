"""The benchmark of cost against length: its arithmetic, its programs, and what it writes."""

import dataclasses
import json

import pytest

from benchmarks import measure, vcc_cost_model, vcc_length, vcc_programs
from jaxmodels.core import attention
from train.flops import count_flops

TERA = 1e12


def small(n, **changes):
    trunk, vcc = vcc_programs.sizes("quickstart", n)
    return trunk, dataclasses.replace(vcc, **changes)


def counted(function, shapes):
    import jax

    return count_flops(jax.make_jaxpr(function)(*shapes))


@pytest.mark.parametrize("layout", ["static", "gather"])
@pytest.mark.parametrize("n", [500, 2048])
@pytest.mark.parametrize(
    ("part", "side"), [(part, side) for part, sides in vcc_programs.PARTS.items() for side in sides]
)
def test_the_formula_is_what_the_program_does(part, side, n, layout):
    program = vcc_programs.make_program(part, side, *small(n, layout=layout), n)
    assert counted(program.forward, program.shapes) == pytest.approx(program.formula, rel=0.02)


@pytest.mark.parametrize(("part", "side"), [("layer", "vcc"), ("layer", "dense")])
def test_the_step_holds_the_whole_backward_pass(part, side):
    """Each product has two gradients: three times the forward (chunked attention recomputes)."""
    n = min(attention.CHUNKING["cpu"][0], attention.CHUNKING_ELSEWHERE[0]) // 2
    program = vcc_programs.make_program(part, side, *small(n), n)
    ratio = counted(program.step, program.shapes) / counted(program.forward, program.shapes)
    assert ratio == pytest.approx(3.0, rel=0.01)


@pytest.mark.parametrize(
    ("n", "r", "dense", "vcc"),
    [(4096, 1216, 1.31, 0.438), (16384, 2419, 12.7, 1.459), (65536, 2977, 169, 4.69)],
)
def test_the_formula_gives_the_published_lengths_and_flops(n, r, dense, vcc):
    """Of the base encoder, 4 local layers and 8 VCC layers."""
    trunk, config = vcc_programs.sizes("roberta_base_4k", n)
    config = dataclasses.replace(config, layout="gather")
    assert vcc_cost_model.rows_run(n, config) == r
    digits = {"rel": 5e-3}
    assert vcc_cost_model.encoder_flops(n, trunk, config) / TERA == pytest.approx(vcc, **digits)
    config = dataclasses.replace(config, kinds=("dense",) * 12)
    assert vcc_cost_model.encoder_flops(n, trunk, config) / TERA == pytest.approx(dense, **digits)


def test_an_unknown_side_names_those_there_are():
    with pytest.raises(ValueError, match="'encoder'.*'all_dense'"):
        vcc_programs.make_program("layer", "all_dense", *small(64), 64)


def rows_of(n, vcc):
    """p slots, m coarse rows, and the b tokens of each of k opened blocks."""
    m = (n - vcc.num_vip) // vcc.block_size
    return vcc.num_vip + m + min(m, vcc.num_fine_blocks) * vcc.block_size


NUMBERS = (
    *("ms", "ms_lower", "ms_upper", "rounds", "ratio"),
    *("peak_mib", "gflop", "gflop_forward", "gflop_formula"),
)


@pytest.fixture(scope="module")
def rows():
    return vcc_length.measure_lengths([256, 512], parts=["layer"], budget_s=300.0)


@pytest.mark.long
def test_measured_rows_are_complete(rows, tmp_path):
    assert [(row["n"], row["side"]) for row in rows] == [
        *((256, "vcc"), (256, "dense")),
        *((512, "vcc"), (512, "dense")),
    ]
    for row in rows:
        assert row["status"] == "measured" and row["reason"] is None
        assert all(row[name] > 0 for name in NUMBERS), row
        assert row["ms_lower"] <= row["ms"] <= row["ms_upper"]
        vcc = small(row["n"])[1]
        assert row["num_vip"] == vcc.num_vip and row["num_fine_blocks"] == vcc.num_fine_blocks
        assert row["rows"] == (row["n"] if row["side"] == "dense" else rows_of(row["n"], vcc))
    path = measure.save("lengths", {"rows": rows}, tmp_path)
    assert json.loads(path.read_text())["rows"] == rows


def test_without_time_left_programs_are_counted_but_not_run():
    rows = vcc_length.measure_lengths([1 << 20], parts=["layer"], budget_s=0.0)
    for row in rows:
        assert row["status"] == "not run" and "were spent" in row["reason"]
        assert row["ms"] is None and row["peak_mib"] is None
        assert row["gflop_forward"] == pytest.approx(row["gflop_formula"], rel=0.02)
    assert rows[1]["gflop"] > 100 * rows[0]["gflop"]


def test_a_program_over_the_memory_limit_is_compiled_but_not_run():
    rows = vcc_length.measure_lengths([256], parts=["layer"], max_gib=1e-6, budget_s=300.0)
    for row in rows:
        assert row["status"] == "not run" and row["reason"].startswith("needs ")
        assert row["peak_mib"] > 0.1


def test_the_table_says_what_was_not_run_and_why(rows):
    missing = dict(rows[3], ms=None, ratio=None, status="not run", reason="no time")
    lines = vcc_length.table([*rows[:3], missing]).splitlines()
    assert lines[0] == "quickstart size, d = 64, one layer: forward + backward"
    assert lines[3].split()[:2] == ["256", str(rows_of(256, small(256)[1]))]
    assert lines[4].split()[4:6] == ["not", "run"]
    assert lines[5] == "  not run: dense layer 512: no time"


def test_the_figure_labels_lines_and_marks_what_was_not_run(rows):
    pytest.importorskip("matplotlib")
    missing = dict(rows[3], ms=None, ratio=None)
    figure = vcc_length.length_figure([*rows[:3], missing])
    time, memory, flops = figure.axes
    assert [axis.get_ylabel() for axis in figure.axes] == [
        *("time, ms", "peak memory, MiB", "GFLOP")
    ]
    for axis in figure.axes:
        assert {"VCC layer", "dense layer"} <= {text.get_text() for text in axis.texts}
    assert "not run" in figure.get_supxlabel()
    hollow = [points for points in memory.collections if points.get_facecolor()[0][0] == 1.0]
    assert len(hollow) == 1 and len(hollow[0].get_offsets()) == 1
    assert not [points for points in time.collections if points.get_facecolor()[0][0] == 1.0]


def test_the_command_writes_json_csv_and_a_figure_a_size(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    arguments = ["--quick", "--lengths=512", "--budget_s=1e-3", f"--out={tmp_path}"]
    monkeypatch.setattr("sys.argv", ["vcc_length", *arguments])
    vcc_length.main()
    assert {path.name for path in tmp_path.iterdir()} == {
        "vcc_length_quick.json",
        "vcc_length_quick.csv",
        "vcc_length_quick_quickstart.png",
        "vcc_length_quick_roberta_base_4k.png",
    }
    result = json.loads((tmp_path / "vcc_length_quick.json").read_text())
    assert {"question", "environment", "rows"} == set(result)
    assert len(result["rows"]) == 2 + 2 + 2  # quickstart layer and encoder, RoBERTa layer
    assert "RoBERTa base, d = 768, one layer" in capsys.readouterr().out
