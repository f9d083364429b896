"""The measuring that every benchmark relies on, with a clock that the test moves."""

import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import measure


class Clock:
    """Seconds that pass only while a side runs."""

    def __init__(self):
        self.now, self.log = 100.0, []

    def __call__(self):
        return self.now

    def side(self, name, *seconds):
        """A callable that takes the next of `seconds` on each call, the last one for ever."""
        left = list(seconds)

        def run():
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def test_sides_take_turns_and_change_order():
    clock = Clock()
    sides = {name: clock.side(name, 1.0) for name in "abc"}
    measure.compare(sides, rounds=2, warmup=1, clock=clock)
    assert "".join(clock.log) == "abc" + "cba" + "abc"


def test_medians_quartiles_and_ratios_leave_the_warm_up_out():
    clock = Clock()
    sides = {
        "vcc": clock.side("vcc", 9.0, 1.0, 2.0, 1.0, 4.0, 1.0),
        "dense": clock.side("dense", 90.0, 3.0, 6.0, 4.0, 12.0, 5.0),
    }
    result = measure.compare(sides, rounds=5, warmup=1, seconds_budget=1e9, clock=clock).to_dict()
    assert result["vcc"]["median_ms"] == pytest.approx(1000.0)
    assert result["dense"]["median_ms"] == pytest.approx(5000.0)
    assert result["dense"]["lower_ms"] == pytest.approx(4000.0)
    assert result["dense"]["upper_ms"] == pytest.approx(6000.0)
    assert result["dense"]["rounds"] == 5 and result["dense"]["warm"]
    # Within turns 3, 3, 4, 3, 5: a slow turn slows both sides and cancels.
    assert result["dense"]["ratio"] == pytest.approx(3.0)
    assert result["vcc"]["ratio"] == 1.0


def test_no_turn_is_begun_that_would_pass_the_budget():
    clock = Clock()
    sides = {"a": clock.side("a", 1.0), "b": clock.side("b", 2.0)}
    result = measure.compare(sides, rounds=20, warmup=1, seconds_budget=10.0, clock=clock)
    assert clock.now - 100.0 == 9.0
    assert len(result.sides["a"].seconds) == 2


def test_the_only_turn_that_time_allows_counts():
    clock = Clock()
    measured = measure.compare(
        {"slow": clock.side("slow", 50.0)}, rounds=3, warmup=2, seconds_budget=60.0, clock=clock
    ).sides["slow"]
    assert measured.median_ms == pytest.approx(50_000.0) and not measured.warm


def test_half_of_few_runs_count():
    clock = Clock()
    side = clock.side("slow", 9.0, 5.0, 7.0)
    result = measure.compare({"slow": side}, rounds=9, warmup=2, seconds_budget=25.0, clock=clock)
    assert result.sides["slow"].seconds == (5.0, 7.0) and result.sides["slow"].warm


def test_a_side_out_of_memory_is_left_out_with_the_reason():
    clock = Clock()

    def exhausted():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 12 GiB wanted\nmore")

    sides = {"a": exhausted, "b": clock.side("b", 1.0)}
    result = measure.compare(sides, rounds=2, warmup=0, clock=clock)
    assert result.sides["a"].skipped == "out of memory: RESOURCE_EXHAUSTED: 12 GiB wanted"
    assert result.sides["a"].median_ms is None
    assert result.sides["b"].median_ms == pytest.approx(1000.0)
    assert result.sides["b"].ratio is None


def test_an_error_that_is_no_lack_of_memory_is_raised():
    def broken():
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        measure.compare({"a": broken})
    with pytest.raises(ValueError, match="rounds >= 1"):
        measure.compare({"a": broken}, rounds=0)


def test_results_are_waited_for():
    class Result:
        waited = False

        def block_until_ready(self):
            self.waited = True

    result = Result()
    measure.compare({"a": lambda: result}, rounds=1, warmup=0)
    assert result.waited


def test_peak_counts_arguments_and_results():
    x = jnp.ones(1024)
    compiled = jax.jit(lambda x: x + 1).lower(x).compile()
    assert measure.peak_bytes(compiled) == 2 * x.nbytes
    donated = jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile()
    assert measure.peak_bytes(donated) == x.nbytes


def test_a_saved_result_is_strict_json_with_its_environment(tmp_path):
    result = {"environment": measure.environment({"preset": "x"}), "rows": [{"ms": float("nan")}]}
    path = measure.save("name", result, tmp_path / "results")
    read = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert read["rows"] == [{"ms": None}]
    assert read["environment"]["config"] == {"preset": "x"}
    assert read["environment"]["jax"] == jax.__version__
    assert {"date", "device", "cores"} <= set(read["environment"])


def test_csv_has_a_line_a_row(tmp_path):
    path = measure.save_csv("name", [{"n": 1, "ms": 2.5}, {"n": 2, "ms": None}], tmp_path)
    assert path.read_text().splitlines() == ["n,ms", "1,2.5", "2,"]
