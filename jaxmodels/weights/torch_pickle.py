"""Interprets the data.pkl of a PyTorch checkpoint as data: no import, no call, no object made.

Not a subclass of pickle.Unpickler: this little machine knows only the instructions that build
dicts, lists, tuples, text and numbers, and the names that describe a tensor. No instruction of it
could reach Python code, whatever the file says. An object of a TorchScript program is a bag of
attributes to it; the name of its class is never looked up.
"""

from __future__ import annotations

import dataclasses
import itertools
import pickletools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxmodels.weights.tensor_file import WeightsError

MAX_PICKLE_BYTES = 64 * 2**20
_MAX_NODES = 1_000_000
_MAX_DEPTH = 64
_MAX_NAME = 1024

# Element type of each storage class that a checkpoint may name.
STORAGES = {
    "torch FloatStorage": "float32",
    "torch HalfStorage": "float16",
    "torch BFloat16Storage": "bfloat16",
    "torch DoubleStorage": "float64",
    "torch LongStorage": "int64",
    "torch IntStorage": "int32",
    "torch ShortStorage": "int16",
    "torch CharStorage": "int8",
    "torch ByteStorage": "uint8",
    "torch BoolStorage": "bool",
    "torch.storage UntypedStorage": "uint8",
}
_ORDERED_DICT = "collections OrderedDict"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
_ALLOWED = frozenset([_ORDERED_DICT, _TENSOR, _PARAMETER, *STORAGES])

# What a TorchScript program names besides: its own classes, and marks around values of attributes.
_SCRIPT_CLASS = re.compile(r"__torch__(\.\w+)* \w+", re.ASCII)
_MARKS = {
    "torch.jit._pickle restore_type_tag": 2,
    "torch.jit._pickle build_tensorlist": 1,
    "torch.jit._pickle build_intlist": 1,
    "torch.jit._pickle build_doublelist": 1,
    "torch.jit._pickle build_boollist": 1,
    "torch device": 1,
}


@dataclasses.dataclass(frozen=True)
class _Global:
    """A name in the pickle; never looked up."""

    name: str


class _Object:
    """An object of a TorchScript class: what its BUILD instruction sets, and nothing else."""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class StorageRef:
    """A storage: `numel` elements of `dtype` (a NumPy or ml_dtypes name), in member data/<key>."""

    key: str
    dtype: str
    numel: int


@dataclasses.dataclass(frozen=True)
class TensorRef:
    """A strided tensor in a storage; offset and strides in elements."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def parse(data: bytes) -> dict[str, TensorRef]:
    """Returns {name: tensor} of a pickle; names of nested containers are joined with dots.

    Raises:
      WeightsError: the pickle names anything but tensors and plain containers, or is damaged.
    """
    return _collect(_Machine().run(data), _items)


def parse_module(data: bytes) -> dict[str, TensorRef]:
    """Returns {name: tensor} of a TorchScript module; names of submodules are joined with dots.

    Raises:
      WeightsError: as `parse`; or no module, or one without a tensor.
    """
    root = _ModuleMachine().run(data)
    if type(root) is not _Object:
        raise WeightsError("a TorchScript program, but its data.pkl holds no module.")
    tensors = _collect(root, _attributes)
    if not tensors:
        raise WeightsError(
            "a TorchScript program whose modules hold no tensor: a frozen one keeps them in its "
            "code. Save the state_dict() of the model before it is frozen."
        )
    return tensors


def _is_count(*values: Any) -> bool:
    return all(type(value) is int and 0 <= value < 2**62 for value in values)


class _Machine:
    """The stack machine; each instruction is a method named after its opcode."""

    # Calls that only mark the type of a value: {name: number of arguments, the value first}.
    marks_around: Mapping[str, int] = {}

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        if len(data) > MAX_PICKLE_BYTES:
            raise WeightsError(f"data.pkl has {len(data)} bytes; the limit is {MAX_PICKLE_BYTES}.")
        try:
            for opcode, argument, _ in pickletools.genops(data):
                if opcode.name == "STOP":
                    break
                self.step(opcode.name, argument)
            (result,) = self.stack
        except WeightsError:
            raise
        # Every way in which damaged bytes can surprise the parser or the stack above.
        except (
            ValueError,
            IndexError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
        ) as error:
            raise WeightsError(f"data.pkl is damaged: {error}") from None
        return result

    def step(self, name: str, argument: Any) -> None:
        if name in _PUSH_ARGUMENT:
            self.stack.append(argument)
        elif name in _PUSH_NEW:
            self.stack.append(_PUSH_NEW[name]())
        elif name in _TUPLES:
            self.stack[-_TUPLES[name] :] = [tuple(self.pop_last(_TUPLES[name]))]
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name not in _SKIPPED:
            method = getattr(self, f"op_{name.lower()}", None)
            if method is None:
                raise WeightsError(
                    f"data.pkl uses the pickle instruction {name}, which a file of tensors does "
                    "not need: refused."
                )
            method(argument)

    def pop_last(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise ValueError("the stack is too short")
        return self.stack[-count:]

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def op_mark(self, _: Any) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def op_memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def op_tuple(self, _: Any) -> None:
        items = self.pop_mark()
        self.stack.append(tuple(items))

    def op_append(self, _: Any) -> None:
        self.extend([self.stack.pop()])

    def op_appends(self, _: Any) -> None:
        self.extend(self.pop_mark())

    def extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("append to something that is not a list")
        self.stack[-1].extend(items)

    def op_setitem(self, _: Any) -> None:
        value = self.stack.pop()
        self.update([self.stack.pop(), value])

    def op_setitems(self, _: Any) -> None:
        self.update(self.pop_mark())

    def update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise ValueError("items set on something that is not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing a deeply nested tuple could overflow the C stack, printing a huge int be slow.
            if type(key) is not str and not _is_count(key):
                raise ValueError(f"a dict key of type {type(key).__name__}")
            target[key] = value

    def accepts(self, name: str) -> bool:
        return name in _ALLOWED

    def op_global(self, argument: Any) -> None:
        if not self.accepts(argument):
            module, _, name = argument.rpartition(" ")
            raise WeightsError(
                f"data.pkl names {module}.{name}, which a file of tensors does not need: refused, "
                "and nothing was run. If you trust the file, load it with PyTorch and save "
                "its tensors as safetensors."
            )
        self.stack.append(_Global(argument))

    def op_stack_global(self, _: Any) -> None:
        module, name = self.pop_last(2)
        del self.stack[-2:]
        if type(module) is not str or type(name) is not str:
            raise ValueError("a global whose name is not text")
        self.op_global(f"{module} {name}")

    def op_binpersid(self, _: Any) -> None:
        match self.stack.pop():
            case ("storage", _Global(name), str(key), str(), numel) if name in STORAGES:
                if not _is_count(numel) or not (key.isascii() and key.isdigit()):
                    raise ValueError("a storage with a wrong key or size")
                self.stack.append(StorageRef(key, STORAGES[name], numel))
            case _:
                raise ValueError("a reference that is not a storage")

    def op_reduce(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(function) is not _Global or type(arguments) is not tuple:
            raise ValueError("a call that does not rebuild a tensor")
        if function.name == _ORDERED_DICT and not arguments:
            self.stack.append({})
        elif function.name == _TENSOR:
            self.stack.append(_tensor(arguments))
        elif function.name == _PARAMETER and len(arguments) == 3:
            if type(arguments[0]) is not TensorRef:
                raise ValueError("a parameter without a tensor")
            self.stack.append(arguments[0])
        elif len(arguments) == self.marks_around.get(function.name):
            self.stack.append(arguments[0])
        else:
            raise ValueError("a call that does not rebuild a tensor")

    def op_build(self, _: Any) -> None:
        # A state dict carries its `_metadata` this way; it holds version numbers only.
        if type(self.stack.pop()) is not dict or type(self.stack[-1]) is not dict:
            raise ValueError("a state set on something that is not a dict")


class _ModuleMachine(_Machine):
    """The same for a TorchScript program: also makes objects, which are bags of attributes."""

    marks_around = _MARKS

    def accepts(self, name: str) -> bool:
        return name in _ALLOWED or name in _MARKS or _SCRIPT_CLASS.fullmatch(name) is not None

    def op_newobj(self, _: Any) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if type(kind) is not _Global or not _SCRIPT_CLASS.fullmatch(kind.name) or arguments != ():
            raise ValueError("an object that is not of a TorchScript class")
        self.stack.append(_Object())

    def op_build(self, _: Any) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is not _Object or type(state) is not dict:
            raise ValueError("an object whose state is not a dict of attributes")
        if target.attributes is not None or not all(type(key) is str for key in state):
            raise ValueError("an object whose attributes are set twice or have no names")
        target.attributes = state


_PUSH_ARGUMENT = frozenset(
    "BINUNICODE SHORT_BINUNICODE BINUNICODE8 BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT".split()
)
_PUSH_NEW = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_SKIPPED = frozenset(["PROTO", "FRAME"])


def _tensor(arguments: tuple[Any, ...]) -> TensorRef:
    """Checks the arguments of _rebuild_tensor_v2 and that the tensor lies inside its storage."""
    if len(arguments) not in (6, 7) or type(arguments[0]) is not StorageRef:
        raise ValueError("a tensor without a storage")
    storage, offset, shape, strides = arguments[:4]
    if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides):
        raise ValueError("a tensor whose shape and strides do not match")
    if not _is_count(offset, *shape, *strides) or len(shape) > 32:
        raise ValueError("a tensor whose shape, strides or offset are not whole numbers >= 0")
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if 0 not in shape and last >= storage.numel:
        raise ValueError(
            f"a tensor {shape} reaches element {last} of a storage that has {storage.numel}"
        )
    return TensorRef(storage, offset, shape, strides)


def _items(value: Any) -> Iterable[tuple[str, Any]]:
    """Returns what a container holds, named; nothing for any other value."""
    if type(value) is dict:
        return ((str(key), item) for key, item in value.items())
    if type(value) in (list, tuple):
        return ((str(i), item) for i, item in enumerate(value))
    return ()


def _attributes(value: Any) -> Iterable[tuple[str, Any]]:
    """Returns the attributes of a module; its lists and dicts are no part of a state dict."""
    return (value.attributes or {}).items() if type(value) is _Object else ()


def _collect(
    root: Any, children: Callable[[Any], Iterable[tuple[str, Any]]]
) -> dict[str, TensorRef]:
    """Returns the tensors under `root`, named by their path; bounded in time and depth."""
    found: dict[str, TensorRef] = {}
    waiting: list[tuple[tuple[str, ...], Any]] = [((), root)]
    nodes = 1
    while waiting:
        path, value = waiting.pop()
        own = list(itertools.islice(children(value), _MAX_NODES))
        nodes += len(own)
        # A few shared or cyclic containers could otherwise stand for endlessly many.
        if nodes > _MAX_NODES or len(path) > _MAX_DEPTH:
            raise WeightsError(
                f"data.pkl nests more than {_MAX_DEPTH} levels or holds over {_MAX_NODES} values."
            )
        if type(value) is TensorRef:
            name = ".".join(path)
            if name in found or len(name) > _MAX_NAME:
                raise WeightsError(f"data.pkl has two tensors, or an over-long name: {name[:80]!r}")
            found[name] = value
        else:
            waiting.extend(((*path, name), item) for name, item in reversed(own))
    return found
