"""The demo's table, sentences and report, from made-up numbers: what a reader is told is so."""

from typing import Any

import pytest

pytest.importorskip("matplotlib")
from benchmarks import demo_blocks, demo_report, demo_runs, vcc_demo


def _side(title: str, accuracy: float, seconds: float) -> dict[str, Any]:
    steps = (40, 80, 120)
    return {
        "title": title,
        "process": {"seconds": 9.0, "peak_bytes": 512 * 2**20},
        "curves": {
            "train": [
                {"step": s, "seconds": seconds * s / 120, "loss": 2.0 - s / 100} for s in steps
            ],
            "validation": [
                {"step": s, "seconds": seconds * s / 120, "accuracy": accuracy * s / 120}
                for s in steps
            ],
        },
        "final": {
            "accuracy": accuracy,
            "recall_vcc1": 0.5,
            "recall_vcc2": 0.75,
            "evaluation_seconds": seconds / 10,
        },
        "swaps": {},
    }


@pytest.fixture
def sides() -> dict[str, Any]:
    found = {"vcc": _side("VCC", 0.96, 30.0), "dense": _side("dense twin", 0.9, 90.0)}
    found["vcc"]["swaps"] = {"VCC, then k = 0": {"accuracy": 0.2}}
    return found


COSTS = {
    name: {"parameters": 1234, "step_gflop": 2.5, "step_peak_bytes": 2**20 * m, "step_ms": ms}
    for name, m, ms in (("vcc", 600, 400.0), ("dense", 2400, 4000.0))
}


def test_the_table_puts_each_number_under_its_head(sides: dict[str, Any]) -> None:
    head, vcc, swapped, dense = vcc_demo.result_table(sides, COSTS)
    assert dict(zip(head, vcc, strict=True)) == {
        "": "VCC",
        "accuracy": "96.0%",
        "answer's block opened": "50.0% / 75.0%",
        "training s": "30",
        "step ms": "400",
        "step memory MiB": "600",
        "process peak MiB": "512",
        "step GFLOP": "2.5",
        "parameters": "1,234",
    }
    assert swapped[:2] == ("VCC, then k = 0", "20.0%") and set(swapped[3:]) == {""}
    assert dense[4] == "4000"


def test_dense_in_the_same_seconds_is_its_last_evaluation_before(sides: dict[str, Any]) -> None:
    steps, seconds, cost, answering = vcc_demo.sentences(sides, COSTS)
    assert "same 120 steps: VCC 96.0%, dense 90.0%" in steps
    assert "same 30 s of training: dense had reached 30.0% (step 40" in seconds
    assert "10.0x" in cost
    assert "VCC 3.0 s, dense 9.0 s: 3.0x" in answering


def test_the_report_escapes_text_and_marks_the_opened_blocks() -> None:
    found = {
        "question": "what is <b>?",
        "answer": "ruby",
        "prediction": "amber",
        "layers": [[1]],
        "blocks": ["one", "two <script>"],
        "answer_block": 0,
        "length": 48,
    }
    page = demo_blocks.to_html(found)
    assert "<script>" not in page and "what is &lt;b&gt;?" in page
    assert page.count('class="cell open"') == 1 and page.count('class="cell holds"') == 1
    assert "(wrong)" in page


def test_the_report_needs_no_other_file(tmp_path, sides: dict[str, Any]) -> None:
    picture = demo_report.image(demo_report.curve_plots(sides))
    demo_report.write(tmp_path / "r.html", [("A & B", picture)], "title")
    page = (tmp_path / "r.html").read_text()
    assert "A &amp; B" in page and "data:image/png;base64," in page and 'src="http' not in page


def test_a_failed_run_stops_the_demo() -> None:
    with pytest.raises(SystemExit, match="status 2"):
        demo_runs.run(["train.main", "--config=configs/vcc.py:nothing", "--workdir=unused"])
