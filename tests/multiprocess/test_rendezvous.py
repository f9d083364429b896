"""The meeting before jax connects the processes; here each process is a thread."""

import concurrent.futures
import socket
import threading
import time

import pytest

from tests.multiprocess.launcher import free_port
from train import rendezvous
from train.clusters import Cluster
from train.errors import RunError


def meet(address, processes, index, timeout=20.0, delay=0.0):
    """The outcome of one process: None, or the text of its error."""
    time.sleep(delay)
    try:
        cluster = Cluster(address, processes, index, "a test")
        rendezvous.meet(cluster, timeout, say=[].append)
    except RunError as error:
        return str(error)


def outcomes(*calls):
    """Those of several processes at once; each call holds the arguments of `meet`."""
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(meet, *call) for call in calls]]


@pytest.fixture
def address():
    return f"127.0.0.1:{free_port()}"


def test_all_come_and_the_port_is_free_again(address):
    assert outcomes(*((address, 5, i) for i in range(5))) == [None] * 5
    with socket.create_server(("127.0.0.1", int(address.split(":")[1]))):
        pass


@pytest.mark.parametrize("late", [0, 2])
def test_f30_a_late_process_is_waited_for(address, late):
    found = outcomes(*((address, 3, i, 20.0, 1.0 if i == late else 0.0) for i in range(3)))
    assert found == [None] * 3


def test_f30_everybody_is_told_who_never_came(address):
    found = outcomes(*((address, 5, i, 2.0) for i in (0, 1, 3)))
    assert len(set(found)) == 1
    assert f"processes 2, 4 of 5 did not come to process 0 at {address} within 2 s" in found[0]


def test_f30_a_process_0_that_never_comes_is_named_with_its_address(address):
    (found,) = outcomes((address, 2, 1, 0.5))
    assert f"process 1 of 2 did not find process 0 at {address} within 0.5 s" in found
    assert "Connection refused" in found


def test_f30_an_unknown_host_is_named():
    (found,) = outcomes(("no-such-host.invalid:1234", 2, 1, 0.5))
    assert "no-such-host.invalid:1234" in found and "within 0.5 s" in found


def test_process_0_says_whom_it_waits_for(address, monkeypatch):
    monkeypatch.setattr(rendezvous, "_REMIND", 0.2)
    told = threading.Event()

    def say(text):
        told.text = text
        told.set()

    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(rendezvous.meet, Cluster(address, 2, 0, "a test"), 20.0, say)
        assert told.wait(10) and told.text == "waiting for process 1 of 2"
        assert meet(address, 2, 1) is None and first.result() is None


def test_two_processes_of_one_number_are_refused(address):
    found = outcomes((address, 3, 0), (address, 3, 1, 3.0), (address, 3, 1, 3.0))
    assert all("two processes were started as process 1" in text for text in found)


def test_another_number_of_processes_is_refused(address):
    found = outcomes((address, 2, 0), (address, 3, 1))
    assert all("process 1 was started as one of 3 processes, process 0 as" in t for t in found)


def test_a_caller_that_hangs_up_or_talks_nonsense_is_forgotten(address):
    host, port = address.split(":")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(meet, address, 2, 0)
        for text in (b"", b"GET / HTTP/1.1\r\n\r\n", b'{"greeting": "jaxmodels", '):
            with rendezvous_line(host, int(port)) as line:
                line.sendall(text)
        assert meet(address, 2, 1) is None and first.result() is None


def rendezvous_line(host, port):
    """A connection to process 0, as soon as it listens."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return socket.create_connection((host, port), timeout=5)
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_another_program_on_the_port_is_no_process_0(address):
    def answer(server):
        while True:
            try:
                line, _ = server.accept()
            except OSError:
                return
            with line:
                line.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with socket.create_server(("127.0.0.1", int(address.split(":")[1]))) as server:
        threading.Thread(target=answer, args=(server,), daemon=True).start()
        (found,) = outcomes((address, 2, 1, 1.0))
        assert "another program answers there" in found
        server.shutdown(socket.SHUT_RDWR)


def test_a_port_that_is_taken_stays_so(address):
    port = int(address.split(":")[1])
    with socket.create_server(("", port)):
        (found,) = outcomes((address, 2, 0, 0.5))
    assert f"process 0 cannot listen on port {port}" in found and "another port" in found
