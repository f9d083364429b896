"""Small sources and transforms that spawned workers can import."""

import os
import time
from typing import Any

import numpy as np


class Numbers:
    """Record i holds its number and a row of `width` values."""

    def __init__(self, size: int, width: int = 3) -> None:
        self.size, self.width = size, width

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return {"record": index, "x": np.arange(self.width) * 0.5 + index}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.size})"


class FailingSource(Numbers):
    """Some records are given, or raise."""

    def __init__(self, size: int, special: dict[int, Any]) -> None:
        super().__init__(size)
        self.special = special

    def __getitem__(self, index: int) -> Any:
        found = self.special.get(index)
        if isinstance(found, Exception):
            raise found
        return super().__getitem__(index) if found is None else found


class Slow(Numbers):
    """Takes a while for each record."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        time.sleep(0.02)
        return super().__getitem__(index)


def add_noise(
    record: dict[str, Any], rng: np.random.Generator, scale: float = 1.0
) -> dict[str, Any]:
    return record | {"noise": scale * rng.random()}


def add_process(record: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Adds where the work was done, and with which platform of jax."""
    del rng
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu"
    return record | {"process": os.getpid(), "on_cpu": on_cpu}
