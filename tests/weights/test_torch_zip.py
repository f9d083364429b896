"""Checkpoints of torch.save: tensors come out right, and nothing else in the file can act."""

import os
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxmodels import weights
from jaxmodels.weights import torch_pickle

FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SIX = np.arange(6, dtype=np.float32).tobytes()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def numbers(values) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(shape=(2, 3), strides=(3, 1), offset=0, numel=6, key="0", kind="torch\nFloatStorage"):
    """The pickle instructions of one tensor, as torch.save writes them."""
    storage = b"(" + text("storage") + b"c" + kind.encode() + b"\n" + text(key) + text("cpu")
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(numel) + b"tQ" + number(offset)
        + numbers(shape) + numbers(strides) + b"\x89ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip


def named(value: bytes, name: str = "w") -> bytes:
    return b"\x80\x02}" + text(name) + value + b"s."


def archive(path, data_pkl: bytes, storage: bytes = SIX, *, compression=0, extra=()):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in [("m/data.pkl", data_pkl), ("m/data/0", storage), *extra]:
            file.writestr(name, content)
    return path


def test_strides_and_offsets_are_respected_without_torch(tmp_path) -> None:
    path = archive(tmp_path / "m.pt", named(tensor((2, 2), (1, 3), 1)))
    np.testing.assert_array_equal(weights.read(path)["w"], [[1, 4], [2, 5]])


def test_a_big_endian_file_reads_the_same(tmp_path) -> None:
    storage = np.frombuffer(SIX, np.float32).astype(">f4").tobytes()
    path = archive(tmp_path / "m.pt", named(tensor()), storage, extra=[("m/byteorder", b"big")])
    np.testing.assert_array_equal(weights.read(path)["w"], np.arange(6.0).reshape(2, 3))


class Payload:
    """Would create a file if anything ran it."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self):
        return (os.system, (f"touch {self.target}",))


@pytest.mark.parametrize("protocol", range(6))
def test_a_payload_never_runs_and_is_named(tmp_path, protocol: int) -> None:
    pickled = pickle.dumps({"w": Payload(str(tmp_path / "owned"))}, protocol)
    with pytest.raises(weights.WeightsError, match="posix.system|refused"):
        weights.read(archive(tmp_path / "m.pt", pickled))
    (tmp_path / "plain.bin").write_bytes(pickled)
    with pytest.raises(weights.WeightsError):
        weights.read(tmp_path / "plain.bin")
    pickle.loads(pickled)
    assert (tmp_path / "owned").exists(), "the payload of this test must be a live one"


INSTRUCTIONS = {
    "builtins.eval": b"cbuiltins\neval\n(X\x01\x00\x00\x001tR",
    "torch.load": b"ctorch\nload\n)R",
    "torch._utils._rebuild_tensor": b"ctorch._utils\n_rebuild_tensor\n.",
    "os.system": text("os") + text("system") + b"\x93)R",
    "instruction INST": b"(ios\nsystem\n",
    "instruction OBJ": b"(No",
    "instruction NEWOBJ": b"ccollections\nOrderedDict\n)\x81",
    "instruction EXT1": b"\x82\x01",
    "instruction PERSID": b"Pstorage\n",
    "instruction BINBYTES": b"B\x00\x00\x00\x00",
    "does not rebuild": b"ctorch\nFloatStorage\n)R",
    "does not rebuild a": b"ccollections\nOrderedDict\n(]tR",
    "not a storage": b"(" + text("storage") + b"tQ",
    "without a storage": b"ctorch._utils\n_rebuild_tensor_v2\n(NNNNNNtR",
    "without a tensor": b"ctorch._utils\n_rebuild_parameter\n(NNNtR",
    "key of type tuple": b"})Ns",
    "not a dict": b"]}b",
    "not a list": b"}Na",
    "damaged": b"h\x09",
}


@pytest.mark.parametrize("reason", INSTRUCTIONS)
def test_everything_but_tensors_is_refused_by_name(tmp_path, reason: str) -> None:
    path = archive(tmp_path / "m.pt", named(INSTRUCTIONS[reason]))
    with pytest.raises(weights.WeightsError, match=reason):
        weights.read(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shape": (2, 4)}, "reaches element 6 of a storage that has 6"),
        ({"offset": 1}, "reaches element 6"),
        ({"strides": (2**61, 1)}, "reaches element"),
        ({"strides": (-1, 1)}, "whole numbers"),
        ({"offset": -1}, "whole numbers"),
        ({"strides": (1,)}, "do not match"),
        ({"shape": (1,) * 40, "strides": (1,) * 40}, "whole numbers"),
        ({"numel": 7}, "should have 28 bytes and is 24 bytes"),
        ({"numel": 2**61, "shape": (2**60, 2), "strides": (2, 1)}, "and is 24 bytes"),
        ({"key": "7"}, "storage 7 should have 24 bytes and is absent"),
        ({"key": "../data.pkl"}, "wrong key"),
        ({"kind": "torch\nComplexFloatStorage"}, "torch.ComplexFloatStorage"),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(tmp_path, fields, message: str) -> None:
    with pytest.raises(weights.WeightsError, match=message):
        weights.read(archive(tmp_path / "m.pt", named(tensor(**fields))))


def test_a_huge_broadcast_tensor_allocates_nothing(tmp_path) -> None:
    path = archive(tmp_path / "m.pt", named(tensor((2**40, 1), (0, 1))))
    assert weights.read(path)["w"].shape == (2**40, 1)
    path = archive(tmp_path / "n.pt", named(tensor((2**40, 2**40), (0, 0))))
    with pytest.raises(weights.WeightsError, match="does not fit"):
        weights.read(path)["w"]


def link() -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("m/data/link")
    info.external_attr = 0o120777 << 16
    return info


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compression": zipfile.ZIP_DEFLATED, "storage": bytes(10**7)}, "'m/data.* is compressed"),
        ({"extra": [("../evil", b"")]}, r"'../evil' is not a plain relative path"),
        ({"extra": [("/etc/evil", b"")]}, "not a plain relative path"),
        ({"extra": [("m/C:\\evil", b"")]}, "not a plain relative path"),
        ({"extra": [(link(), b"/etc/passwd")]}, "symbolic link"),
        ({"extra": [("n/data.pkl", b"")]}, r"2 data\.pkl"),
        ({"extra": [("m/constants.pkl", b"")]}, "TorchScript"),
        ({"extra": [("m/byteorder", b"middle")]}, "byte order"),
    ],
)
def test_a_wrong_zip_is_refused_and_nothing_is_extracted(tmp_path, options, message) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    path = archive(folder / "m.pt", named(tensor()), **options)
    with pytest.raises(weights.WeightsError, match=message):
        weights.read(path)
    assert [p.name for p in tmp_path.rglob("*")] == ["inside", "m.pt"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_occurs_twice_is_refused(tmp_path) -> None:
    path = archive(tmp_path / "m.pt", named(tensor()), extra=[("m/data/0", SIX)])
    with pytest.raises(weights.WeightsError, match="occurs twice"):
        weights.read(path)


def test_an_npz_is_not_taken_for_a_checkpoint(tmp_path) -> None:
    np.savez(tmp_path / "m.npz", a=np.zeros(2))
    with pytest.raises(weights.WeightsError, match="not a checkpoint of torch.save"):
        weights.read(tmp_path / "m.npz")


def test_containers_that_repeat_without_end_are_cut_off() -> None:
    cycle = b"\x80\x02]q\x00h\x00a."
    doubling = b"\x80\x02)q\x00" + b"".join(b"h\x00h\x00\x86q\x00" for _ in range(60)) + b"."
    deep_key = b"\x80\x02})" + b"\x85" * 10**5 + b"Ns."
    for data in (cycle, doubling, deep_key):
        with pytest.raises(weights.WeightsError):
            torch_pickle.parse(data)


@pytest.mark.filterwarnings("ignore:invalid escape")
@FUZZ
@given(st.binary(max_size=120), st.integers(0, 10**4))
def test_garbage_pickles_raise_only_weights_errors(garbage: bytes, position: int) -> None:
    good = named(tensor())
    cut = position % len(good)
    for data in (garbage, b"\x80\x02" + garbage + b".", good[:cut] + garbage + good[cut + 1 :]):
        try:
            torch_pickle.parse(data)
        except weights.WeightsError:
            pass


@FUZZ
@given(flips=st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), min_size=1))
def test_damaged_archives_raise_only_weights_errors(tmp_path, flips) -> None:
    path = archive(tmp_path / "m.pt", named(tensor()), extra=[("m/byteorder", b"little")])
    content = bytearray(path.read_bytes())
    for position, value in flips:
        content[position % len(content)] = value
    path.write_bytes(content)
    for cut in (len(content), flips[0][0] % len(content)):
        path.write_bytes(content[:cut])
        try:
            dict(weights.read_torch(path)) if cut else dict(weights.read(path))
        except weights.WeightsError:
            pass


def torch_example(torch):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        name: torch.tensor([[0, 1, 0], [1, 1, 0]]).to(getattr(torch, name))
        for name in "float16 bfloat16 float32 float64 int64 int32 int16 int8 uint8 bool".split()
    }
    views = {"t": base.T, "part": base[1:3, ::2], "base": base, "wide": base[:1].expand(5, 6)}
    rest = {"empty": torch.zeros(0, 3), "0d": torch.tensor(3), "p": torch.nn.Parameter(base[0])}
    return tensors | views | rest


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_files_of_real_torch_read_exactly(tmp_path, protocol: int) -> None:
    torch = pytest.importorskip("torch")
    tensors = torch_example(torch)
    torch.save(tensors, tmp_path / "m.bin", pickle_protocol=protocol)
    found = weights.read(tmp_path / "m.bin")
    assert list(found) == list(tensors)
    for name, value in tensors.items():
        value = value.detach()
        if value.dtype == torch.bfloat16:
            wanted = value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        else:
            wanted = value.numpy()
        assert found.dtype(name) == wanted.dtype and found.shape(name) == wanted.shape
        np.testing.assert_array_equal(found[name], wanted, err_msg=name)


def test_a_training_checkpoint_of_real_torch_gives_its_state_dict(tmp_path) -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    everything = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    torch.save(everything, tmp_path / "m.ckpt")
    tensors = weights.read(tmp_path / "m.ckpt")
    assert "optimizer.state.0.exp_avg" in tensors
    state = tensors.under("state_dict.")
    assert list(state) == list(model.state_dict())
    np.testing.assert_array_equal(state["0.weight"], model[0].weight.detach().numpy())
    np.testing.assert_array_equal(state["0.weight"], state["1.weight"])


def test_whole_modules_and_legacy_files_of_real_torch_are_refused(tmp_path) -> None:
    torch = pytest.importorskip("torch")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(weights.WeightsError, match="torch.nn.modules.linear.Linear"):
        weights.read(tmp_path / "module.pt")
    legacy = tmp_path / "legacy.pt"
    torch.save({"a": torch.ones(2)}, legacy, _use_new_zipfile_serialization=False)
    with pytest.raises(weights.WeightsError, match="plain pickle.*safetensors.torch.save_file"):
        weights.read(legacy)
