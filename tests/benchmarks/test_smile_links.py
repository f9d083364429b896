"""Nodes in network namespaces: shaped both ways, refused where not permitted, never left behind."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import smile_links

HOLD = (
    "import signal, time; from benchmarks import smile_links\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background ignores it
    "with smile_links.joined(2, 100): print('made', flush=True); time.sleep(60)"
)


@pytest.fixture
def permitted():
    why = smile_links.unavailable()
    if why:
        pytest.skip(why)


def left_by(pid):
    files = Path("/etc/netns").glob(f"{smile_links.PREFIX}-{pid}-*")
    return [name for name, owner in smile_links.present().items() if owner == pid] + list(files)


def test_both_ends_of_every_link_are_shaped_and_none_without_a_rate():
    commands = smile_links.Links(3, 200, pid=7).commands()
    shaping = [" ".join(command) for command in commands if command[0] == "tc"]
    assert len(shaping) == 6 and all("tbf rate 200mbit burst 256kbit" in s for s in shaping)
    for node in range(3):
        assert sum(f"dev node{node} " in s and "-7-hub" in s for s in shaping) == 1
        assert sum(f"-7-{node} " in s and "dev eth0" in s for s in shaping) == 1
    assert not [c for c in smile_links.Links(3, 0).commands() if c[0] == "tc"]


def test_no_command_names_an_interface_outside_the_namespaces():
    for command in smile_links.Links(2, pid=7).commands():
        inside = command[1] == "-n" and command[2].startswith("smile-links-7-")
        assert inside or command[:3] == ["ip", "netns", "add"], command


@pytest.mark.parametrize(("nodes", "rate"), [(0, 1), (201, 1), (2, -1)])
def test_links_that_cannot_be_are_refused(nodes, rate):
    with pytest.raises(ValueError, match="1 to 200 nodes"):
        smile_links.Links(nodes, rate)


def test_without_permission_or_tools_a_line_says_so(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(shutil, "which", lambda tool: f"/sbin/{tool}")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert smile_links.unavailable() == "network namespaces need root"
    monkeypatch.setattr(os, "geteuid", lambda: 0)

    def refuse(command):
        raise smile_links.LinksError("ip netns list: Operation\nnot permitted")

    monkeypatch.setattr(smile_links, "_run", refuse)  # root in a container
    assert smile_links.unavailable() == "ip netns list: Operation not permitted"
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    assert "ip and tc not found" in smile_links.unavailable()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "darwin" in smile_links.unavailable()


def test_namespaces_are_gone_after_a_block_that_fails(permitted):
    with pytest.raises(ZeroDivisionError), smile_links.joined(2, 100) as links:
        assert len(left_by(os.getpid())) == 5  # the hub, two nodes and their files
        shown = subprocess.run(
            links.inside(1, ["sh", "-c", "tc qdisc show dev eth0; cat /etc/hosts"]),
            capture_output=True,
            text=True,
        ).stdout
        assert "tbf" in shown and links.address(1) in shown
        raise ZeroDivisionError
    assert not left_by(os.getpid())


def test_namespaces_are_gone_when_making_them_fails_half_way(permitted, monkeypatch):
    plain = smile_links._run

    def fails_late(command):
        if "addr" in command and command[2].endswith("-1"):
            raise smile_links.LinksError("node 1")
        return plain(command)

    monkeypatch.setattr(smile_links, "_run", fails_late)
    with pytest.raises(smile_links.LinksError, match="node 1"), smile_links.joined(2, 100):
        pass
    assert not left_by(os.getpid())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_namespaces_are_gone_after_a_signal_or_at_the_next_start(permitted, number):
    root = Path(smile_links.__file__).parents[1]
    command = [sys.executable, "-c", HOLD]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"made\n" and len(left_by(process.pid)) == 5
        process.send_signal(number)
        process.wait(30)
    if number == signal.SIGKILL:
        assert process.pid in smile_links.remove_leftovers()
    assert not left_by(process.pid)
