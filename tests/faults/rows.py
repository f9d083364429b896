"""A data set of rows in a file, and a toy method that trains on it: what data faults happen to."""

import base64
import io
import json
import os
import pathlib
import signal
import time
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxmodels.core.task import Evaluator
from jaxmodels.data import cache_folder, checks, pipeline
from tests.train.toy import ToyTask

LENGTH, CLASSES = 8, 4


def row(number: int, **changes: Any) -> dict[str, Any]:
    """A good row with changes; a field that is changed to None is absent."""
    made = {"text": f"row {number % 97}", "label": number % CLASSES, "weight": [1.0, 0.5, 0.25]}
    return {name: value for name, value in (made | changes).items() if value is not None}


def write(path: pathlib.Path, rows: list[dict[str, Any]]) -> pathlib.Path:
    """Writes rows, bytes in base64."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coded = lambda value: {"base64": base64.b64encode(value).decode()}  # noqa: E731
    path.write_text("".join(json.dumps(each, default=coded) + "\n" for each in rows))
    return path


class Rows:
    """Random access to the rows of a file; a file beside it may ask a worker for trouble.

    `kill-K`, `stop-K` or `hang-K` beside it: whoever reads row K is killed, stopped or sleeps.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.lines = path.read_text().splitlines()
        self.fingerprint = {
            "name": "rows",
            "version": "1.0.0",
            "records": len(self.lines),
            "sha256": cache_folder.sha256(path),
        }

    def __len__(self) -> int:
        return len(self.lines)

    def __repr__(self) -> str:
        return f"Rows({len(self)})"

    def where(self, index: int) -> str:
        return f"{self.path}, line {index + 1}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        self._trouble(index)
        decoded = lambda d: base64.b64decode(d["base64"]) if "base64" in d else d  # noqa: E731
        return json.loads(self.lines[index], object_hook=decoded)

    def _trouble(self, index: int) -> None:
        for kind in ("kill", "stop", "hang"):
            if (self.path.parent / f"{kind}-{index}").exists():
                (self.path.parent / f"pid-{os.getpid()}").touch()
                if kind == "hang":
                    time.sleep(600)
                os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)


def example(record: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The checked example of a row; dropout of tokens makes it depend on the random numbers."""
    text = checks.check_text(record, "text", longest=LENGTH)
    label = checks.check_field(record, "label", kinds="iu", shape=(), low=0, high=CLASSES - 1)
    weight = checks.check_field(record, "weight", kinds="f", shape=(3,), low=0)
    if "image" in record:
        decode_image(record)
    used = np.frombuffer(text.encode()[:LENGTH], np.uint8) % 63 + 1
    ids = np.zeros(LENGTH, np.uint16)
    ids[: len(used)] = np.where(rng.random(len(used)) < 0.1, 1, used)
    return {
        "input_ids": ids,
        "attention_mask": np.arange(LENGTH) < len(used),
        "label": label.astype(np.int64),
        "scale": np.float32(weight.mean()),
    }


def decode_image(record: dict[str, Any]) -> np.ndarray:
    """Pixels of the field `image`."""
    from PIL import Image

    with checks.decoding("image", "a JPEG or PNG image"):
        return np.asarray(Image.open(io.BytesIO(record["image"])).convert("RGB"))


class RowsTask(ToyTask):
    """The toy classifier on `rows.jsonl` of `data.dir`, evaluated on `valid.jsonl` beside it."""

    def datasets(self, split: str) -> Any:
        config = self.config
        options = pipeline.options_from(config.data)
        source = Rows(pathlib.Path(config.data.dir) / f"{split}.jsonl")
        if split == "train":
            stage = pipeline.Stage(source, example, config.batch_size)
            return pipeline.train_batches([stage], seed=config.seed, options=options)
        return pipeline.eval_batches(source, example, config.batch_size, options=options)

    def metrics(self, params: Any, batch: Any, rng: Any = None) -> Any:
        return super().metrics(params, {"weight": batch["scale"]} | dict(batch), rng)

    def evaluators(self) -> dict[str, Evaluator]:
        if not (pathlib.Path(self.config.data.dir) / "valid.jsonl").exists():
            return {}
        return {"valid": Evaluator(lambda: self.datasets("valid"), self.metrics)}


def make_task(config: ConfigDict) -> RowsTask:
    """Returns the task."""
    return RowsTask(config)
