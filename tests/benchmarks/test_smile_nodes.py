"""Nodes of the measured exchange: nothing hangs, the slowest node counts, two hops send less."""

import json
import os
import types

import jax
import numpy as np
import pytest

from benchmarks import smile_counters, smile_exchange_worker, smile_links, smile_nodes
from benchmarks.smile_exchange_worker import FORMS, Job
from jaxmodels.smile import grid

SNMP = """Ip: Forwarding DefaultTTL
Ip: 2 64
Tcp: ActiveOpens OutSegs RetransSegs
Tcp: 3 {segments} 4
"""
DEV = """Inter-|   Receive                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs
    lo:    7  1 0 0 0 0 0 0   50  6 0 0 0 0 0 0
  eth0:    8  2 0 0 0 0 0 0 {sent} 10 0 0 0 0 0 0
"""
TCP = """  sl  local_address rem_address   st
   0: 0100007F:1F90 00000000:0000 0A
   1: 01004D0A:9C40 02004D0A:9C41 01
   2: 01004D0A:9C40 01004D0A:9C42 01
   3: 01004D0A:733C 02004D0A:9C43 01
   4: 01004D0A:9C44 02004D0A:9C45 06
"""


def test_counters_are_read_by_name_and_interface():
    before = smile_counters.parse(SNMP.format(segments=100), DEV.format(sent=9000))
    after = smile_counters.parse(SNMP.format(segments=160), DEV.format(sent=9900))
    assert before == smile_counters.Counters(100, 4, 9000, 10, 50)
    differences = after.since(before, runs=3)
    assert differences["segments"] == 20 and differences["link_bytes"] == 300


def test_only_established_connections_to_other_nodes_count_and_not_the_coordinator():
    assert smile_counters.connections(TCP, without_port=0x733C) == 1


def record(flat, two_hop, segments):
    counters = {form: {"segments": segments} for form in FORMS}
    seconds = {"flat": flat, "two_hop": two_hop, "bi_level": flat}
    opened = {"flat": 4, "two_hop": 2, "bi_level": 0}
    told = {"kind": "exchange", "size": 64, "seconds": seconds, "counters": counters}
    return told | {"connections": opened}


def test_a_run_takes_as_long_as_its_slowest_node():
    nodes = [record([0.004, 0.002], [0.001, 0.001], 10), record([0.002, 0.008], [0.002, 0.004], 30)]
    flat, two_hop, _ = smile_nodes.rows(nodes)
    assert flat["median_ms"] == pytest.approx(6) and two_hop["median_ms"] == pytest.approx(3)
    assert flat["gain"] == 1 and two_hop["gain"] == pytest.approx(2)
    assert two_hop["segments"] == 20 and two_hop["connections_opened"] == 2


def sleeper(*_):
    return ["sleep", "60"]


def test_a_group_that_hangs_is_killed_and_said_to_hang(tmp_path, monkeypatch):
    monkeypatch.setattr(smile_nodes, "command", sleeper)
    job = Job(2, 2, (64,), timeout_s=0.3)
    outcome = smile_nodes.run(smile_links.Links(2), job)
    assert "nodes [0, 1] had not ended after 0.3 s" in outcome.failed and not outcome.rows
    with smile_nodes.started(smile_links.Links(2), job, tmp_path) as group:
        pass
    assert [process.returncode for process in group] == [-9, -9]


def test_others_do_not_wait_for_a_node_that_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(smile_nodes, "_GRACE", 0.2)
    fails = lambda links, job, node, folder: ["sh", "-c", "exit 3"] if node else sleeper()  # noqa: E731
    monkeypatch.setattr(smile_nodes, "command", fails)
    outcome = smile_nodes.run(smile_links.Links(2), Job(2, 2, (64,), timeout_s=60))
    assert outcome.failed.startswith("node 1 ended with status 3; 1 others were killed")


def test_cases_written_before_a_failure_stay(monkeypatch):
    whole = json.dumps(record([0.1], [0.1], 1) | {"load": 1.0, "congestion_control": "reno"})

    def writes(links, job, node, folder):  # node 1 is cut off in its second line
        lines = [whole, whole] if node == 0 else [whole, whole[:40]]
        (folder / f"{node}.jsonl").write_text("\n".join(lines))
        return ["sh", "-c", f"exit {node}"]

    monkeypatch.setattr(smile_nodes, "command", writes)
    outcome = smile_nodes.run(smile_links.Links(2), Job(2, 2, (64,)))
    assert outcome.failed and [row["form"] for row in outcome.rows] == list(FORMS)
    assert outcome.facts == {"load": [1.0], "congestion_control": "reno"}


def test_a_node_ends_when_the_process_that_started_it_is_gone(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    read, write = os.pipe()
    os.close(write)
    smile_exchange_worker._end_with(read)
    os.close(read)
    assert ended == [4]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_brings_each_block_back_to_its_sender(form):
    state = {
        "x": np.arange(2 * 3 * 2 * 3 * 2, dtype=np.float32).reshape(2, 3, 2, 3, 2),
        "filled": np.arange(12, dtype=np.int32).reshape(2, 3, 2),
    }

    def cell(where, _, own):
        return smile_exchange_worker.there_and_back(form, where, own)

    found = jax.jit(lambda state: grid.run(cell, grid.Grid(2, 3), {}, state))(state)
    np.testing.assert_array_equal(found["x"], state["x"])
    sent = state["filled"].transpose(2, 1, 0) if form == "bi_level" else state["filled"]
    np.testing.assert_array_equal(found["filled"], sent)


def test_forms_that_disagree_are_not_measured():
    state = {"x": jax.numpy.ones(4)}
    programs = {form: lambda s: s for form in FORMS} | {"flat": lambda s: {"x": s["x"] + 1}}
    case = types.SimpleNamespace(kind="exchange", size=8, programs=programs, state=state)
    with pytest.raises(RuntimeError, match="100.00% of the values"):
        smile_exchange_worker._check(case)


@pytest.mark.long
def test_two_hops_open_fewer_connections_and_send_fewer_segments():
    why = smile_links.unavailable()
    if why:
        pytest.skip(why)
    job = Job(2, 2, (256, 16384), ((8, 8, 8),), rounds=1, case_s=1, timeout_s=240)
    with smile_links.joined(2, 1000) as links:
        outcome = smile_nodes.run(links, job)
    assert outcome.failed is None
    kinds = ["exchange", "exchange", "forward", "forward+backward"]
    assert [row["kind"] for row in outcome.rows[::3]] == kinds
    for size, rows in zip(job.sizes, (outcome.rows[:3], outcome.rows[3:6]), strict=True):
        found = {row["form"]: row for row in rows}
        assert found["flat"]["connections_opened"] == 4  # 2 devices with 2 of the other node
        assert found["two_hop"]["connections_opened"] == 2
        assert found["bi_level"]["connections_opened"] == 0  # it has those of two hops
        assert found["two_hop"]["segments"] < found["flat"]["segments"]
        payload = 2 * 2 * size  # every device to every device of the other node, either way
        for row in rows:
            assert row["link_bytes"] > payload
    assert found["flat"]["link_bytes"] < 1.2 * payload
    assert found["two_hop"]["link_bytes"] == pytest.approx(found["flat"]["link_bytes"], rel=0.1)
    assert found["two_hop"]["loopback_bytes"] > 1.5 * found["flat"]["loopback_bytes"]
