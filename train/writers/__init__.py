"""Where the numbers of a run go: metrics.jsonl (the truth), TensorBoard, W&B and the console."""

from train.writers.composite import Writers, open_writers
from train.writers.console import TRAIN, Console, duration
from train.writers.metrics_file import JsonLines
from train.writers.tensorboard import TensorBoard

__all__ = ["TRAIN", "Console", "JsonLines", "TensorBoard", "Writers", "duration", "open_writers"]
