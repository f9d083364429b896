"""F10, F12, F16-F19, F40, F42: full disks, buckets that refuse, two runs, other settings."""

import contextlib
import errno
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
from etils import epath

from tests.train import runs, toy_config
from tests.train.cloud import HttpError, cloud  # noqa: F401  (a fixture)
from train import lock, rundir, storage
from train.errors import RunError, UsageError
from train.lock import Lock
from train.loop import train
from train.writers import Console, TensorBoard, Writers, growing, open_writers
from train.writers.metrics_file import JsonLines

TOY = "--config=tests/train/toy_config.py:quickstart"
SECRET = "c2VjcmV0LXNpZ25hdHVyZQ"


def steps(workdir, split="train"):
    return [line["step"] for line in runs.lines(workdir, split)]


def snapshot(workdir):
    """{path: (content, time of change)} of every file."""
    return {
        str(path.relative_to(workdir)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(workdir.rglob("*"))
        if path.is_file()
    }


def no_space(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with room for 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True
    )
    if made.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk):
    """Leaves no room; returns the file to remove for some."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 512):
            pass
    return filler


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished toy run of four steps."""
    workdir = tmp_path_factory.mktemp("toy") / "run"
    train(runs.config(total_steps=4, eval_every=2), workdir, toy_config.FIELDS)
    return workdir


# --- F10: disk full ---------------------------------------------------------------------------


def test_f10_a_full_disk_is_said_once_and_metrics_come_back_whole(small_disk):
    said = []
    lines = JsonLines(small_disk / "metrics.jsonl", 0, said.append)
    lines.write(1, "train", {"loss": 1.0})
    filler = fill(small_disk)
    size = os.path.getsize(small_disk / "metrics.jsonl")
    for step in range(2, 200):  # more than what fits in the file's last page
        lines.write(step, "train", {"loss": 1.0})
    assert len(said) == 1 and "No space left" in said[0] and "training goes on" in said[0]
    assert os.path.getsize(small_disk / "metrics.jsonl") >= size
    assert steps(small_disk)[:1] == [1]  # every line there is whole
    filler.unlink()
    lines.write(200, "train", {"loss": 1.0})
    assert steps(small_disk) == list(range(1, 201))
    lines.close()
    assert len(said) == 2 and "no line is missing" in said[1]


def test_f10_a_full_disk_ends_tensorboard_and_not_the_run(small_disk, tmp_path, capsys):
    board = TensorBoard(small_disk / "tensorboard", 0)
    writers = Writers(board, JsonLines(tmp_path / "metrics.jsonl", 0), Console(1000))
    fill(small_disk)
    for step in range(1, 1000):
        writers.write(step, "train", {"loss": 1.0, "accuracy": 0.5})
    writers.flush()
    writers.close()
    assert capsys.readouterr().out.count("TensorBoard failed (") == 1
    assert steps(tmp_path) == list(range(1, 1000))


def test_f10_training_survives_metrics_and_tensorboard_on_a_full_disk(
    tmp_path, monkeypatch, capsys
):
    real = growing._Local.append
    written = []

    def append(self, data):
        written.append(data)
        return real(self, data) if len(written) < 8 else no_space()

    monkeypatch.setattr(growing._Local, "append", append)
    assert train(runs.config(total_steps=9), tmp_path / "run", toy_config.FIELDS).step == 9
    text = capsys.readouterr().out
    assert text.count("metrics.jsonl cannot be written") == 1
    assert text.count("TensorBoard failed") == 1


def test_f10_a_log_on_a_full_disk_stops_nothing():
    script = (
        "from train.writers import Console, Writers\n"
        "from train.writers.console import say\n"
        "say('before'); w = Writers(Console(5)); w.say('line')\n"
        "w.write(1, 'train', {'loss': 1.0}); w.close()"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=runs.ROOT, stdout=full, stderr=subprocess.PIPE
        )
    assert (done.returncode, done.stderr) == (0, b"")


def test_f10_a_full_disk_at_the_start_is_a_wrong_use(small_disk, tmp_path):
    fill(small_disk)
    with pytest.raises(UsageError, match="cannot be used: the disk is full; free some space"):
        storage.probe(small_disk / "run")
    (tmp_path / "metrics.jsonl").write_text('{"step": 9, "split": "train"}\n' * 2 + "half")
    JsonLines(tmp_path / "metrics.jsonl", 3).close()  # cutting back needs no space
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_f10_a_read_only_folder_is_a_wrong_use(small_disk, tmp_path):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = runs.python("-m", "train.main", TOY, f"--workdir={small_disk}/run")
    assert done.returncode == 2
    assert "cannot be used: the file system is read-only" in done.stderr
    assert done.stderr.count("\n") == 1


# --- F12: buckets -----------------------------------------------------------------------------


def test_f12_a_missing_bucket_is_named(cloud):  # noqa: F811
    with pytest.raises(UsageError, match="there is no bucket gs://elsewhere .* mend the name"):
        storage.probe("gs://elsewhere/run")


@pytest.mark.parametrize("what", ["write", "list", "mkdir"])
def test_f12_a_refusal_names_the_roles_that_are_needed(cloud, what):  # noqa: F811
    cloud.denied.add(what)
    with pytest.raises(UsageError) as error:
        storage.probe("gs://here/run")
    text = str(error.value)
    assert "access to gs://here is denied" in text and f"storage.{what} access" in text
    assert "roles/storage.objectUser" in text and "storage.buckets.get" in text
    assert cloud.store == {}


def test_f12_missing_credentials_say_how_to_log_in(cloud):  # noqa: F811
    cloud.always = HttpError(401, "Anonymous caller")
    with pytest.raises(UsageError, match="gcloud auth application-default login"):
        storage.probe("gs://here/run")


def test_f12_a_busy_bucket_is_tried_again_with_growing_pauses(cloud, monkeypatch):  # noqa: F811
    pauses, said = [], []
    monkeypatch.setattr(storage.time, "sleep", pauses.append)
    monkeypatch.setattr(storage, "RETRIES", type(storage.RETRIES)())
    cloud.failures.extend([HttpError(503), HttpError(429, "slow down"), HttpError(503)])
    storage.probe("gs://here/run", said.append)
    assert storage.RETRIES == {"503": 2, "429": 1}
    assert len(said) == 3 and "HttpError 429: slow down" in said[1]
    assert [round(pause / 2**i) for i, pause in enumerate(pauses)] == [1, 1, 1]


def test_f12_a_bucket_that_stays_busy_is_a_failure_and_no_wrong_use(cloud, monkeypatch):  # noqa: F811
    monkeypatch.setattr(storage.time, "sleep", lambda _: None)
    cloud.always = HttpError(503)
    with pytest.raises(RunError, match="does not answer .HttpError 503.* after 6 attempts"):
        storage.probe("gs://here/run")


def test_f12_config_and_metrics_of_a_run_live_in_a_bucket(cloud, monkeypatch):  # noqa: F811
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.001)
    workdir = epath.Path("gs://here/run")
    rundir.save_config(workdir, runs.config())
    assert rundir.changes(workdir, runs.config(), toy_config.FIELDS) == []
    assert rundir.load_config(workdir)[0] == runs.config()
    for start, last in ((0, 3), (2, 4)):
        with open_writers(workdir, runs.config(), start) as writers:
            for step in range(start + 1, last + 1):
                writers.write(step, "train", {"loss": 1.0})
            cloud.failures.append(HttpError(503))
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert len(list((workdir / "tensorboard").iterdir())) == 2


# --- F16, F17, F19: run again -----------------------------------------------------------------


@pytest.mark.slow
def test_f16_a_longer_run_goes_on_and_says_what_its_schedule_does(tmp_path, capsys):
    workdir = tmp_path / "run"
    train(runs.config(total_steps=5), workdir, toy_config.FIELDS)
    capsys.readouterr()
    train(runs.config(total_steps=7), workdir, toy_config.FIELDS)
    text = capsys.readouterr().out
    assert "total_steps 5 -> 7 (the cosine schedule now ends there: the learning rate at" in text
    assert "at step 5 is 0.0075, it was to be 0)" in text
    assert steps(workdir) == list(range(1, 8))
    lines = rundir.changes(
        workdir, runs.config(total_steps=8, optimizer__schedule="cosine"), toy_config.FIELDS
    )
    assert len(lines) == 1


def test_f17_running_a_finished_run_again_writes_nothing(finished, capsys):
    before = snapshot(finished)
    for _ in range(2):
        trained = train(runs.config(total_steps=4, eval_every=2), finished, toy_config.FIELDS)
        assert trained.step == 4
    assert "finished already at step 4" in capsys.readouterr().out
    assert snapshot(finished) == before


def test_f19_a_folder_of_another_config_is_refused_with_the_differences(finished):
    before = snapshot(finished)
    done = runs.python(
        "-m",
        "train.main",
        TOY,
        f"--workdir={finished}",
        "--config.total_steps=4",
        "--config.seed=3",
        "--config.model.width=32",
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "model.width 64 -> 32; seed 0 -> 3 (as saved -> as asked for)" in done.stderr
    assert snapshot(finished) == before


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\x00", b'{"seed": "no"}'])
def test_f19_a_damaged_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(UsageError, match=r"config.json|another config"):
        rundir.changes(tmp_path, runs.config(), toy_config.FIELDS)
    with pytest.raises(UsageError, match="config.json"):
        rundir.load_config(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == text


def test_f44_a_config_from_before_a_field_existed_means_its_default(tmp_path):
    rundir.save_config(tmp_path, runs.config())
    values = json.loads((tmp_path / "config.json").read_text())
    del values["on_nonfinite"], values["distributed"]
    values["an_option_since_removed"] = None
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert rundir.changes(tmp_path, runs.config(), toy_config.FIELDS) == []
    with pytest.raises(UsageError, match="on_nonfinite stop -> skip"):
        rundir.changes(tmp_path, runs.config(on_nonfinite="skip"), toy_config.FIELDS)
    assert rundir.load_config(tmp_path)[0].distributed.timeout_seconds == 300


def test_checkpoints_without_a_config_are_pointed_out(tmp_path):
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    (line,) = rundir.changes(tmp_path, runs.config(), toy_config.FIELDS)
    assert "config.json is gone" in line


# --- F18: two runs at once --------------------------------------------------------------------

HOLD = (
    "import sys; from train.lock import Lock; Lock(sys.argv[1]).__enter__();"
    "print('held', flush=True); sys.stdin.read()"
)


def start_holder(workdir):
    """A process that holds the folder until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(workdir)],
        cwd=runs.ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"held\n"
    return process


def test_f18_the_second_of_two_runs_is_refused_and_a_dead_ones_lock_is_taken(tmp_path, capsys):
    holder = start_holder(tmp_path)
    with holder:
        try:
            with pytest.raises(UsageError) as error:
                train(runs.config(total_steps=4), tmp_path, toy_config.FIELDS)
            assert f"process {holder.pid}, since 20" in str(error.value)
            assert sorted(path.name for path in tmp_path.iterdir()) == [lock.FILE]
        finally:
            holder.kill()
    train(runs.config(total_steps=4), tmp_path, toy_config.FIELDS)
    text = capsys.readouterr().out
    assert f"process {holder.pid}, since 20" in text and "its process is gone" in text
    assert not (tmp_path / lock.FILE).exists()


def test_f18_a_refused_run_leaves_the_first_ones_lock(tmp_path):
    with Lock(tmp_path):
        done = runs.python("-m", "train.main", TOY, f"--workdir={tmp_path}")
        assert done.returncode == 2 and "is in use by another run: host" in done.stderr
        assert (tmp_path / lock.FILE).exists()


# --- F40: secrets -----------------------------------------------------------------------------


def test_f40_no_output_of_a_failing_run_holds_a_secret(tmp_path):
    done = runs.python(
        "-m",
        "train.main",
        TOY,
        f"--workdir={tmp_path}/run",
        f"--config.optimizer.name=https://host/weights?X-Goog-Signature={SECRET}",
    )
    assert done.returncode == 2 and "optimizer.name=https://host/weights?***" in done.stderr
    broken = tmp_path / "broken.py"
    broken.write_text(f"raise OSError('GET https://h/w?sig={SECRET}: 403, {SECRET[::-1]}')")
    again = runs.python("-m", "train.main", f"--config={broken}", MY_API_KEY=SECRET[::-1])
    assert again.returncode == 2
    broken.unlink()
    rundir.save_config(tmp_path, runs.config(warm_start=f"https://h/w?sig={SECRET}"))
    with open_writers(tmp_path, runs.config(), 0) as writers:
        writers.say(f"reading https://h/w?sig={SECRET}")
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    written += [text.encode() for run in (done, again) for text in (run.stdout, run.stderr)]
    outputs = b"".join(written)
    assert SECRET.encode() not in outputs and SECRET[::-1].encode() not in outputs


def test_f40_a_new_signature_of_the_same_address_is_no_other_config(tmp_path):
    first, second = (runs.config(warm_start=f"https://h/w?sig={s}") for s in ("a" * 9, "b" * 9))
    rundir.save_config(tmp_path, first)
    assert rundir.changes(tmp_path, second, toy_config.FIELDS) == []


# --- F42: the clock and the order of steps ----------------------------------------------------


def test_f42_each_step_is_there_once_after_a_kill_and_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with open_writers(tmp_path, runs.config(), 0) as writers:
        for step in range(1, 8):
            writers.write(step, "train", {"loss": float(step)})
        writers.write(4, "valid", {"loss": 0.5})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 8, "spl')  # killed while writing
    with open_writers(tmp_path, runs.config(), 4) as writers:
        writers.write(4, "valid", {"loss": 0.5})  # the evaluation that was owed, made again
        for step in range(5, 10):
            writers.write(step, "train", {"loss": float(step)})
    assert steps(tmp_path) == list(range(1, 10)) and steps(tmp_path, "valid") == [4]


def test_f42_lines_damaged_in_the_middle_do_not_stop_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "split": "train"}).encode() for step in (1, 2, 3, 4)]
    lines[1] = b"\x00" * 20
    lines[2] = lines[0]
    path.write_bytes(b"\n".join(lines))  # no newline at the end either
    JsonLines(path, 10).close()
    assert steps(tmp_path) == [1, 4]
    assert path.read_bytes().endswith(b"\n")


@pytest.mark.slow
def test_f42_a_clock_that_jumps_back_disturbs_nothing(tmp_path, monkeypatch):
    now = [2e9]

    def jumping():
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", jumping)
    trained = train(
        runs.config(total_steps=6, checkpoint_every=2), tmp_path / "run", toy_config.FIELDS
    )
    train(runs.config(total_steps=8, checkpoint_every=2), tmp_path / "run", toy_config.FIELDS)
    lines = runs.lines(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 9))
    seconds = [line["seconds"] for line in lines]
    assert 0 < seconds[0] and seconds == sorted(seconds) and trained.seconds < 60
    assert all(line["step_ms"] > 0 and 0 <= line["data_wait"] <= 1 for line in lines)
    names = sorted(path.name for path in pathlib.Path(tmp_path / "run/tensorboard").iterdir())
    assert len(names) == 2 and int(names[1].split(".")[3]) > int(names[0].split(".")[3])
