"""The benchmark of exchanges: its cost model says what the links say, and the table is written."""

import json
import re

import pytest

from benchmarks import smile_all2all, smile_links, smile_report
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


def test_the_tables_are_printed_and_written(tmp_path, capsys) -> None:
    smile_all2all.main(["--tokens", "1024", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "smile_all2all.json").read_text())
    assert written["settings"]["tokens"] == 1024 and len(written["gpu"]) == 20
    assert "a model, not a measurement" in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == 1  # what was measured before is not written over


def test_where_links_are_not_permitted_the_rest_goes_on(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(smile_links, "unavailable", lambda: "network namespaces need root")
    flags = ["--measure", "--dispatch", "16x4x2", "--budget_s", "2", "--out", str(tmp_path)]
    smile_all2all.main(flags)
    told = capsys.readouterr().out
    assert told.count("not measured: network namespaces need root\n") == 1
    assert "one-hot" in told and (tmp_path / "smile_all2all_4x8_1000mbit.png").exists()
    written = json.loads((tmp_path / "smile_all2all_4x8_1000mbit.json").read_text())
    assert "need root" in written["failed"] and len(written["dispatch"]) == 6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--nodes", "1"], "2 to 8"),
        (["--devices", "9"], "2 to 8"),
        (["--sizes", "6"], "multiples of 4"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(flags, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        smile_all2all.main(["--measure", "--out", str(tmp_path), *flags])
    assert not list(tmp_path.iterdir())


def test_lists_of_sizes_are_read() -> None:
    asked = smile_all2all.parser().parse_args(["--sizes", "256,1024", "--layers", ""])
    assert asked.sizes == (256, 1024) and asked.layers == ()
    job = smile_all2all.job_of(asked)
    assert job.case_s * 2 < asked.budget_s < job.timeout_s
    assert smile_all2all.shapes("8x4x2,1x2x3") == ((8, 4, 2), (1, 2, 3))
    with pytest.raises(SystemExit):
        smile_all2all.parser().parse_args(["--layers", "8x4"])


def row(form: str, gain: float, least: float) -> dict:
    times = {"median_ms": 4.0, "lower_ms": 3.0, "upper_ms": 5.0, "rounds": 9}
    sent = {"segments": 20.0, "link_bytes": 2e3, "loopback_bytes": 1e3}
    row = {"kind": "exchange", "size": 4096, "form": form, "connections_opened": 2}
    return row | times | sent | {"gain": gain, "gain_least": least}


def test_a_gain_counts_only_where_the_least_disturbed_runs_agree() -> None:
    rows = [row("flat", 1, 1), row("two_hop", 2.0, 1.9), row("bi_level", 2.0, 1.0)]
    two_hop, bi_level = smile_report.verdict(rows)
    assert "faster: exchange, 4K B a peer 2.00x (1.90x). slower: none" in two_hop
    assert "faster: none" in bi_level and "not told apart: exchange" in bi_level
    assert re.search(r"two hops +4\.0 +3\.0-5\.0 +9 +2\.00x", smile_report.exchange_table(rows))
