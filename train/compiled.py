"""A jitted function, compiled once for each shape of batch, with the compilation in plain sight."""

import time
from typing import Any

import jax

from jaxmodels.core.task import Batch
from train.flops import count_flops

_SHOWN = 2  # changed arrays in a line


class PerShape:
    """Calls `function(first, batch)` by programs compiled ahead, one a batch shape.

    The shape of `first` is taken never to change. Compiling by hand tells its time apart from the
    step's, gives the FLOPs, and leaves no way to compile twice unseen.

    Attributes:
      seconds: spent compiling.
      compilations: programs compiled.
    """

    def __init__(self, function: Any):
        """Takes a function of `jax.jit`."""
        self.seconds = 0.0
        self.compilations = 0
        self._function = function
        self._programs: dict[Any, tuple[Any, int]] = {}
        self._asked: tuple[Any, tuple[Any, ...]] = None, ()

    def ready(self, batch: Batch) -> bool:
        """Whether the program for this batch's shape is compiled."""
        return self._key(batch) in self._programs

    def prepare(self, first: Any, batch: Batch) -> None:
        """Compiles for these shapes (arrays or placed shape structs), where not done yet."""
        if self.ready(batch):
            return
        start = time.perf_counter()
        with jax.transfer_guard("allow"):  # constants of the program go to the device here
            traced = self._function.trace(first, batch)
            self._programs[self._key(batch)] = traced.lower().compile(), count_flops(traced.jaxpr)
        self.seconds += time.perf_counter() - start
        self.compilations += 1

    def changed(self, batch: Batch) -> str:
        """Returns what this batch has other than the one compiled for last; empty for the first."""
        if not self._programs:
            return ""
        before, now = (
            {name: rest for name, *rest in key}
            for key in (list(self._programs)[-1], self._key(batch))
        )
        names = [name for name in now | before if now.get(name) != before.get(name)]
        names.sort(key=lambda name: name != "input_ids")
        said = [f"{n} {_text(before.get(n))} -> {_text(now.get(n))}" for n in names[:_SHOWN]]
        return ", ".join(said) + (f" and {len(names) - _SHOWN} more" if names[_SHOWN:] else "")

    def flops(self, batch: Batch) -> int:
        """FLOPs of one call with a batch of this shape, all devices together."""
        return self._programs[self._key(batch)][1]

    def __call__(self, first: Any, batch: Batch) -> Any:
        """Runs the program for this batch's shape, compiling it first where needed."""
        self.prepare(first, batch)
        return self._programs[self._key(batch)][0](first, batch)

    def _key(self, batch: Batch) -> tuple[Any, ...]:
        """The shapes of a batch; those of the batch asked about last are kept."""
        if batch is not self._asked[0]:
            found = tuple((name, value.shape, value.dtype) for name, value in batch.items())
            self._asked = batch, found
        return self._asked[1]


def shapes(batch: Batch) -> str:
    """Returns the shape of a batch in words, by its ids or its largest array: `x [32, 512]`."""
    name = "input_ids" if "input_ids" in batch else max(batch, key=lambda key: batch[key].size)
    return f"{name} {list(batch[name].shape)}"


def _text(array: list[Any] | None) -> str:
    return "absent" if array is None else f"{array[1].name}{list(array[0])}"
