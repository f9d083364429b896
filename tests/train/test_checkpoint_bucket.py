"""Checkpoints in a bucket: everything but the arrays, whose writer is replaced by a plain one.

TensorStore speaks to a bucket by itself and needs a real one.
"""

import io

import jax
import numpy as np
import pytest
from etils import epath

from tests.train import checkpoint_cases as cases
from tests.train.cloud import HttpError, cloud
from train import storage
from train.checkpoint import Checkpoints, load_params, manifest
from train.checkpoint import arrays as arrays_lib
from train.checkpoint import writer as writer_lib
from train.errors import CheckpointError

__all__ = ["cloud"]
WORKDIR = "gs://here/runs/first"
PARTS = {"frozen": cases.frozen()}


class PlainWriter:
    """Writes each item to one file, in place."""

    def __init__(self, label):
        pass

    def start(self, folder, trees, progress):
        self.files = {arrays_lib.progress_file(0, 1): progress.encode()}
        for item, tree in trees.items():
            arrays, file = jax.tree.leaves(tree), io.BytesIO()
            raw = [np.frombuffer(np.asarray(a).tobytes(), np.uint8) for a in arrays]
            np.savez(file, *raw)
            self.files[f"{item}/arrays.npz"] = file.getvalue()
        self.folder = folder

    def join(self):
        for name, data in self.files.items():
            with (self.folder / name).open("wb") as file:
                file.write(data)

    def close(self):
        pass


def plain_read(folder, tree):
    with (folder / "arrays.npz").open("rb") as file:
        raw = np.load(io.BytesIO(file.read()))
    leaves, structure = jax.tree.flatten(tree)
    values = [
        np.frombuffer(raw[f"arr_{i}"].tobytes(), leaf.dtype).reshape(leaf.shape)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, jax.device_put(values))


@pytest.fixture(autouse=True)
def plain(cloud, monkeypatch):
    monkeypatch.setattr(writer_lib, "ArrayWriter", PlainWriter)
    monkeypatch.setattr(arrays_lib, "read", plain_read)
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.01)


def names(folder=f"{WORKDIR}/checkpoints"):
    return sorted(path.name for path in epath.Path(folder).iterdir())


def saved_steps(count, **settings):
    with Checkpoints(WORKDIR, **settings) as saved:
        for step in range(1, count + 1):
            saved.save(step, cases.state(step, **PARTS), {"position": step})
            assert saved.wait() is None


def test_a_bucket_keeps_and_gives_back_checkpoints():
    saved_steps(3, keep=2)
    assert names() == ["2", "3", "frozen"]
    wanted = cases.state(3, **PARTS)
    with Checkpoints(WORKDIR) as saved:
        found = saved.restore(cases.plan(wanted))
    assert found.progress == {"position": 3}
    cases.assert_same(found.state, wanted)
    params, step = load_params(WORKDIR, cases.plan(wanted).abstract.params)
    assert step == 3 and jax.tree.map(cases.bits, params) == jax.tree.map(cases.bits, wanted.params)
    assert load_params(f"{WORKDIR}/checkpoints/2", cases.plan(wanted).abstract.params)[1] == 2


def test_a_damaged_step_in_a_bucket_is_moved_aside():
    saved_steps(2)
    path = epath.Path(WORKDIR) / "checkpoints/2/training/arrays.npz"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(bytes(data))
    said = []
    with Checkpoints(WORKDIR, say=said.append) as saved:
        assert saved.restore(cases.plan(cases.state(**PARTS))).step == 1
    assert "checkpoint 2 is damaged: training/arrays.npz differs" in said[0]
    assert f"moved to {WORKDIR}/checkpoints/damaged/2" in said[0]
    assert names() == ["1", "damaged", "frozen"]
    assert names(f"{WORKDIR}/checkpoints/damaged") == ["2", "2.txt"]


def test_what_a_killed_save_left_in_a_bucket_is_swept():
    saved_steps(2)
    root = epath.Path(WORKDIR) / "checkpoints"
    (root / "3.unfinished").touch()
    (root / "3" / "params" / "arrays.npz").write_bytes(b"half")
    with Checkpoints(WORKDIR) as saved:
        found = saved.restore(cases.plan(cases.state(**PARTS)))
        assert found.step == 2
        saved.save(4, cases.state(4, **PARTS), {})
        saved.wait()
    assert names() == ["1", "2", "4", "frozen"]


def test_f09_a_bucket_that_refuses_is_told_with_its_answer(cloud):
    with Checkpoints(WORKDIR) as saved:
        saved.save(1, cases.state(1), {})
        assert saved.wait() is None
        cloud.always = HttpError(503)
        saved.save(2, cases.state(2), {})
        assert "backend error, 503" in saved.wait()
        saved.save(3, cases.state(3), {})
        assert "backend error, 503" in saved.poll()
        cloud.always = None
        saved.save(4, cases.state(4), {})
        assert saved.wait() is None
    assert names() == ["1", "4"]


def test_a_busy_bucket_is_read_again(monkeypatch):
    saved_steps(1)
    real, answers = manifest.read, [HttpError(503), HttpError(429)]

    def busy(folder):
        if answers:
            raise answers.pop(0)
        return real(folder)

    monkeypatch.setattr(manifest, "read", busy)
    with Checkpoints(WORKDIR) as saved:
        assert saved.restore(cases.plan(cases.state(**PARTS))).step == 1


def test_a_bucket_that_forbids_reading_is_not_damage(monkeypatch):
    saved_steps(1)
    monkeypatch.setattr(manifest, "_hash", lambda path: (_ for _ in ()).throw(HttpError(403)))
    with Checkpoints(WORKDIR) as saved:
        with pytest.raises(CheckpointError, match="cannot be read: HttpError: backend error, 403"):
            saved.restore(cases.plan(cases.state(**PARTS)))
    assert names() == ["1", "frozen"]
