"""The benchmark of exchanges: its cost model says what the links say, and the table is written."""

import json

import pytest

from benchmarks import measure, smile_all2all
from jaxmodels.smile import cost_model

BUFFER = cost_model.Buffer(16384, 768)


def test_without_costs_of_messages_two_hops_never_win_on_gpus() -> None:
    for row in smile_all2all.gpu_rows(BUFFER):
        assert 0.8 < row["ideal_ratio"] <= 1.0, row


def test_with_them_the_gain_grows_with_the_nodes() -> None:
    found = {(r["hardware"], r["shape"]): r for r in smile_all2all.gpu_rows(BUFFER)}
    assert found["p4d", "16x8"]["ratio"] == pytest.approx(2.17, abs=0.01)
    ratios = [found["p4d", f"{n}x8"]["ratio"] for n in (2, 4, 8, 16)]
    assert ratios == sorted(ratios)
    assert found["p4d", "16x8"]["peers"] == "127 / 22"


def test_inside_a_slice_two_hops_cost_up_to_twice() -> None:
    rows = smile_all2all.tpu_rows(BUFFER)
    assert min(row["ideal_ratio"] for row in rows if row["peers"] == "-") == pytest.approx(0.5)
    assert all(row["ideal_ratio"] < 1 for row in rows)


def test_a_network_without_peers_takes_no_time() -> None:
    alone = cost_model.GpuCluster(1, 8, 450e9, 50e9).predict(BUFFER)
    assert alone["t_inter"] == 0 and alone["internode_bytes"] == 0


def test_the_tables_are_printed_and_written(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(measure.save, "__defaults__", (tmp_path,))
    smile_all2all.main(["--tokens", "1024"])
    written = json.loads((tmp_path / "smile_all2all.json").read_text())
    assert written["settings"]["tokens"] == 1024 and len(written["gpu"]) == 20
    assert "a model, not a measurement" in capsys.readouterr().out
