"""The files and lines that numbers end in."""

import io
import json
import math

import pytest

from train.metrics import Counters, rates
from train.writers import Console, JsonLines, duration

VALUES = {
    "loss": 2.5,
    "examples_per_second": 812.4,
    "step_ms": 24.26,
    "data_wait": 0.021,
    "mfu": 0.123,
}


def test_jsonl_is_cut_back_to_the_step_continued_from(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path, 0)
    for step in (1, 2, 3):
        first.write(step, "train", {"loss": float(step)})
    first.write(3, "valid", {"loss": 0.5})
    first.close()
    with path.open("a") as file:
        file.write('{"step": 4, "spl')  # killed while writing
    second = JsonLines(path, 2)
    second.write(3, "train", {"loss": math.nan, "accuracy": math.inf})
    second.close()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["step"], r["split"], r["loss"]) for r in records] == [
        (1, "train", 1.0),
        (2, "train", 2.0),
        (3, "train", None),
    ]
    assert records[-1]["accuracy"] is None
    JsonLines(path, 0).close()
    assert path.read_text() == ""


def test_a_log_gets_one_plain_line_a_record():
    stream = io.StringIO()
    console = Console(100, stream)
    console.write(10, "train", VALUES)
    console.write(10, "valid", {"accuracy": 0.75, "evaluation_seconds": 1.25, "seconds": 9.0})
    console.close()
    assert stream.getvalue().splitlines() == [
        "step 10/100 | loss 2.5 | 812.4 examples/s | 24.3 ms | data 2% | mfu 12.3% | eta 2s",
        "step 10 | valid | accuracy 0.75 | 1.2 s",
    ]


def test_a_terminal_gets_a_bar_drawn_over(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "60")
    stream = Terminal()
    console = Console(100, stream)
    console.write(50, "train", VALUES)
    console.say("a line")
    console.write(100, "train", VALUES)
    console.close()
    text = stream.getvalue()
    assert "[##########..........] 50/100 | loss 2.5" in text
    assert "\r\x1b[Ka line\n" in text and text.endswith("\n")
    assert all(len(part.rpartition("\x1b[K")[2]) < 60 for part in text.splitlines())


@pytest.mark.parametrize(("seconds", "text"), [(4.6, "5s"), (200, "3m20s"), (7500, "2h05m")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_rates_are_over_the_time_between():
    before = Counters(step=10, seconds=5.0, waited=1.0, examples=100, tokens=1000, flops=1e9)
    now = Counters(step=20, seconds=7.0, waited=1.5, examples=300, tokens=5000, flops=5e9)
    assert rates(before, now, 4e9) == {
        "examples_per_second": 100.0,
        "tokens_per_second": 2000.0,
        "step_ms": 200.0,
        "data_wait": 0.25,
        "mfu": 0.5,
    }


def test_what_is_not_known_is_left_out():
    values = rates(Counters(), Counters(step=1, seconds=1.0, examples=4), None)
    assert "mfu" not in values and "tokens_per_second" not in values
