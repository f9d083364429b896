"""Checkpoints of torch.save: tensors come out right, and nothing else in the file can act."""

import pickle
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmodels import weights
from jaxmodels.weights import torch_pickle
from tests.weights.archives import (
    FLIPS,
    FUZZ,
    SIX,
    Payload,
    archive,
    damaged,
    named,
    opened,
    tensor,
    text,
)


def test_strides_and_offsets_are_respected_without_torch(tmp_path) -> None:
    path = archive(tmp_path / "m.pt", named(tensor((2, 2), (1, 3), 1)))
    np.testing.assert_array_equal(weights.read(path)["w"], [[1, 4], [2, 5]])


def test_a_big_endian_file_reads_the_same(tmp_path) -> None:
    storage = np.frombuffer(SIX, np.float32).astype(">f4").tobytes()
    path = archive(tmp_path / "m.pt", named(tensor()), storage, extra=[("m/byteorder", b"big")])
    np.testing.assert_array_equal(weights.read(path)["w"], np.arange(6.0).reshape(2, 3))


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
        weights.read_torch(tmp_path / "m.npz")


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
@given(flips=FLIPS)
def test_damaged_archives_raise_only_weights_errors(tmp_path, flips) -> None:
    path = archive(tmp_path / "m.pt", named(tensor()), extra=[("m/byteorder", b"little")])
    for _ in damaged(path, flips):
        opened(path)
        opened(path, weights.read_torch)


def test_a_big_endian_scalar_stays_a_scalar(tmp_path) -> None:
    path = tmp_path / "m.pt"
    archive(path, named(tensor((), (), 0, 1)), b"\x3f\x80\0\0", extra=[("m/byteorder", b"big")])
    found = weights.read(path)["w"]
    assert found.shape == () and found == 1.0


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


def test_wide_lists_inside_each_other_are_cut_off_before_they_fill_the_memory(monkeypatch) -> None:
    monkeypatch.setattr(torch_pickle, "_MAX_NODES", 10**4)
    value: tuple = ()
    for _ in range(20):  # each holds the one before, very often; a small file says this
        value = (value,) * 10**5
    monkeypatch.setattr(torch_pickle._Machine, "run", lambda machine, data: value)
    tracemalloc.start()
    try:
        with pytest.raises(weights.WeightsError, match="holds over"):
            torch_pickle.parse(b"")
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    finally:
        tracemalloc.stop()


def test_float16_empty_and_shared_tensors_of_nested_dicts_read_exactly(tmp_path) -> None:
    torch = pytest.importorskip("torch")
    base = torch.arange(12.0).half()
    inner = {"a": base[:6].view(2, 3), "b": base[3:9], "none": base[:0].view(0, 5), "all": base}
    torch.save({"model": {"state_dict": inner}, "step": 3, "best": None}, tmp_path / "m.pt")
    found = weights.read(tmp_path / "m.pt").under("model.").under("state_dict.")
    assert list(found) == list(inner)
    for name, value in inner.items():
        assert found.dtype(name) == np.float16 and found.shape(name) == tuple(value.shape)
        np.testing.assert_array_equal(found[name], value.numpy())
    with zipfile.ZipFile(tmp_path / "m.pt") as file:
        assert sum("/data/" in name for name in file.namelist()) == 1, "not one shared storage"
