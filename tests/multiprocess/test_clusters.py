"""How a process finds out which run it belongs to: flags, then variables, then the scheduler."""

import http.server
import threading

import pytest

from train import clusters
from train.clusters import Cluster
from train.errors import UsageError

SLURM = {
    "SLURM_JOB_ID": "5001",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[007-009,020],big1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "3",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
GKE = {"TPU_WORKER_HOSTNAMES": "w-0,w-1,w-2,w-3", "TPU_WORKER_ID": "3"}


def find(*flags, **environment):
    return clusters.find(*(flags or (None, None, None)), environment)


def test_a_lone_process_is_left_alone():
    assert find() is None
    assert find(None, 1, None) is None
    assert find("127.0.0.1:99", 1, 0) is None
    assert find(**SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None
    assert find(TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0") is None


def test_flags_say_it_all():
    found = find("[fd00::1]:80", 4, 3)
    assert (found.address, found.processes, found.index) == ("[fd00::1]:80", 4, 3)


def test_flags_win_over_variables_and_these_over_the_scheduler():
    variables = {"JAX_COORDINATOR_ADDRESS": "a", "JAX_COORDINATOR_PORT": "7"}
    numbers = {"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}
    assert find(**variables, **numbers).address == "a:7"
    assert find("b:9", None, 1, **variables, **numbers).index == 1
    assert find(**variables, **SLURM) == Cluster("a:7", 4, 2, "Slurm (SLURM_STEP_NUM_TASKS)")
    assert find("b:9", None, None, **SLURM).address == "b:9"
    assert find(None, 1, None, **SLURM) is None


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu[007-009,020],big1", "gpu007"),
        ("gpu[007,020]", "gpu007"),
        ("one", "one"),
        ("one,two", "one"),
        ("one,gpu[1-3]", "one"),
    ],
)
def test_slurm_the_first_node_of_the_step_is_process_0(nodes, host):
    found = find(**SLURM | {"SLURM_STEP_NODELIST": nodes})
    # the port that jax takes: the job's number, at the end of the range
    assert found.address == f"{host}:{65536 - 4096 + 5001 % 4096}"
    assert (found.processes, found.index) == (4, 2)


@pytest.mark.parametrize("step", [None, "4294967290", "4294967291"])
def test_slurm_a_shell_or_a_batch_script_is_no_run_of_several(step):
    shell = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}
    assert find(**shell | ({"SLURM_STEP_ID": step} if step else {})) is None


def test_open_mpi_before_5_names_its_host_and_later_asks_for_it():
    assert find(**MPI).address == f"10.96.0.1:{65536 - 4096 + 1531576320 // 4096 % 4096}"
    six = MPI | {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp6://[fe80::1,2620::2]:43370"}
    assert find(**six).address == f"[fe80::1]:{65536 - 4096 + 1}"
    five = {name: value for name, value in MPI.items() if "uri" not in name}
    with pytest.raises(UsageError, match="--coordinator_address missing: Open MPI"):
        find(**five)
    assert find("h:1", None, None, **five) == Cluster("h:1", 3, 1, find(**MPI).source)


def test_tpu_slices_on_gke():
    assert find(**GKE) == Cluster("w-0:8482", 4, 3, "the TPU environment")
    two = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}
    many = find(**GKE, **two, MEGASCALE_COORDINATOR_ADDRESS="first-0.svc:8080")
    assert (many.address, many.processes, many.index) == ("first-0.svc:8482", 8, 7)
    assert "2 slices" in many.source
    addresses = {"TPU_PROCESS_ADDRESSES": "p-0:8476,p-1:8476", "TPU_WORKER_ID": "1"}
    assert find(**addresses).address == "p-0:8482"
    assert find(**GKE, JAX_PLATFORMS="cpu") is None


@pytest.fixture
def metadata_server(monkeypatch):
    """The server that every virtual machine of a TPU slice can ask."""
    answers = {
        "worker-network-endpoints": "n1:0:10.0.0.4,n2:1:10.0.0.5",
        "agent-worker-number": "1",
        "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-16'\nZONE: 'here'\n",
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rsplit("/", 1)[1]
            known = name in answers and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(answers[name].encode() if known else b"")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(clusters, "has_tpu", lambda environment: True)
        yield f"127.0.0.1:{server.server_port}", answers
        server.shutdown()


def test_tpu_virtual_machines_ask_their_metadata(metadata_server):
    address, answers = metadata_server
    assert find(GCE_METADATA_IP=address) == Cluster("10.0.0.4:8482", 2, 1, "the TPU environment")
    answers["worker-network-endpoints"] = "host-a,host-b"
    answers["tpu-env"] += (
        "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
        "MEGASCALE_COORDINATOR_ADDRESS: '10.9.9.9'\n"
    )
    found = find(GCE_METADATA_IP=address)
    assert (found.address, found.processes, found.index) == ("10.9.9.9:8482", 4, 3)
    del answers["agent-worker-number"]
    assert find(GCE_METADATA_IP=address) is None


def test_f30_flags_that_do_not_fit_together_are_refused_before_anything():
    for flags, message in [
        (("h:1", None, None), "--num_processes and --process_id missing"),
        ((None, 2, 0), "--coordinator_address missing"),
        (("h:1", 2, 2), "process_id=2 with num_processes=2: accepted is 0 to"),
        (("h:1", 0, 0), "at least one process"),
        (("h", 2, 0), "coordinator_address=h: accepted is HOST:PORT"),
        ((":123", 2, 0), "accepted is HOST:PORT"),
        (("h:x", 2, 0), "accepted is HOST:PORT"),
        (("h:70000", 2, 0), "a port of 1 to 65535"),
        (("http://h:1", 2, 0), "accepted is HOST:PORT"),
        (("fd00::1:80", 2, 0), r"\[fd00::1\]:1234"),
    ]:
        with pytest.raises(UsageError, match=message):
            find(*flags)
    with pytest.raises(UsageError, match="JAX_PROCESS_ID=one: accepted is a whole number"):
        find("h:1", 2, None, JAX_PROCESS_ID="one")
    with pytest.raises(UsageError, match="--num_processes and --process_id missing"):
        find(JAX_COORDINATOR_ADDRESS="h:1")


@pytest.mark.parametrize(
    ("tasks", "visible", "found"),
    [
        ("1(x4)", "0,1,2,3,4,5,6,7", None),  # one process a node: every GPU
        ("8(x4)", "0,1,2,3,4,5,6,7", [5]),  # all tasks see all GPUs: one each
        ("8(x4)", "3", None),  # bound by Slurm: what it sees is its own
        ("8", "", None),
        ("2(x2),1", "0,1", [5]),
    ],
)
def test_slurm_tasks_that_see_the_same_gpus_take_one_each(tasks, visible, found):
    environment = SLURM | {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_LOCALID": "5"}
    assert clusters.local_devices(environment | {"CUDA_VISIBLE_DEVICES": visible}) == found


def test_outside_slurm_a_process_takes_all_that_it_sees():
    assert clusters.local_devices({"CUDA_VISIBLE_DEVICES": "0,1"}) is None
