"""What is written down at each start of a run."""

import json

from etils import epath

from tests.train.cloud import HttpError, cloud  # noqa: F401  (a fixture)
from train import distributed, starts
from train.starts import record_start


def test_each_start_adds_a_line(tmp_path, cloud):  # noqa: F811
    for workdir in (tmp_path, epath.Path("gs://here/run")):
        for step in (0, 7):
            record_start(workdir, step, ["8 x TPU v5 lite"], processes=2)
        lines = [json.loads(line) for line in (workdir / starts.FILE).read_text().splitlines()]
        assert [line["step"] for line in lines] == [0, 7]
        assert lines[1]["devices"] == ["8 x TPU v5 lite"] and lines[1]["processes"] == 2
        assert lines[1]["versions"] == distributed.versions() and "jax" in lines[1]["versions"]


def test_no_start_fails_for_it(tmp_path, cloud):  # noqa: F811
    said = []
    record_start(tmp_path / "absent", 0, [], say=said.append)
    cloud.always = HttpError(403, "denied")
    record_start("gs://here/run", 0, [], say=said.append)
    assert "cannot be written" in said[0] and "cannot be uploaded" in said[1]
