"""TorchScript programs: parameters and buffers come out by name, and no code of them is used."""

import pathlib
import pickle
import zipfile

import numpy as np
import pytest
from hypothesis import given

from jaxmodels import weights
from jaxmodels.weights import torch_pickle
from tests.weights.archives import (
    FLIPS,
    FUZZ,
    SIX,
    Payload,
    archive,
    damaged,
    number,
    opened,
    tensor,
    text,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean"),
    pytest.mark.filterwarnings("ignore:invalid escape"),
]
MODULE = b"c__torch__.model.___torch_mangle_7\nNet\n)\x81"


def attributes(**values: bytes) -> bytes:
    return b"}(" + b"".join(text(name) + value for name, value in values.items()) + b"u"


def module(**values: bytes) -> bytes:
    return MODULE + attributes(**values) + b"b"


def program(path, root: bytes, *, extra=(), **options):
    """A file as torch.jit.save writes one; its code is no Python, so that reading it would fail."""
    code = zipfile.ZipInfo("m/code/__torch__.py")
    code.compress_type = zipfile.ZIP_DEFLATED
    members = [("m/constants.pkl", b"no pickle"), (code, b"no code " * 99), *extra]
    return archive(path, b"\x80\x02" + root + b".", extra=members, **options)


def test_modules_inside_modules_are_named_by_their_path(tmp_path) -> None:
    inner = module(weight=tensor(), training=b"\x89", bias=b"N")
    path = program(tmp_path / "m.pt", module(visual=module(conv1=inner), scale=tensor((), ())))
    found = weights.read(path)
    assert list(found) == ["visual.conv1.weight", "scale"]
    np.testing.assert_array_equal(found["visual.conv1.weight"], np.arange(6.0).reshape(2, 3))
    assert found["scale"].shape == () and found["scale"] == 0


def test_attributes_that_a_state_dict_leaves_out_are_left_out(tmp_path) -> None:
    one = tensor((1,), (1,))
    listed = b"ctorch.jit._pickle\nbuild_tensorlist\n(](" + one + b"etR"
    tagged = b"ctorch.jit._pickle\nrestore_type_tag\n(" + attributes(k=one) + text("Dict") + b"tR"
    ints = b"ctorch.jit._pickle\nbuild_intlist\n(](" + number(3) + b"etR"
    device = b"ctorch\ndevice\n" + text("cpu") + b"\x85R"
    root = module(w=tensor(), listed=listed, tagged=tagged, ints=ints, device=device)
    assert list(weights.read(program(tmp_path / "m.pt", root))) == ["w"]


def test_a_module_used_twice_is_listed_twice_and_one_in_itself_is_cut_off() -> None:
    shared = module(w=tensor()) + b"q\x07"
    found = torch_pickle.parse_module(b"\x80\x02" + module(a=shared, b=b"h\x07") + b".")
    assert list(found) == ["a.w", "b.w"] and found["a.w"] == found["b.w"]
    endless = b"\x80\x02" + MODULE + b"q\x07" + attributes(a=b"h\x07") + b"b."
    with pytest.raises(weights.WeightsError, match="nests more than"):
        torch_pickle.parse_module(endless)


REFUSED = {
    "posix.system": module(w=b"cposix\nsystem\n(" + text("true") + b"tR"),
    "torch.jit._pickle.build_tensor_from_id": b"ctorch.jit._pickle\nbuild_tensor_from_id\n",
    "names __torch__x.Net": b"c__torch__x\nNet\n",
    "names __torch__.a-b.c": b"c__torch__.a-b\nc\n",
    "names torch.nn.Linear": b"ctorch.nn\nLinear\n)\x81",
    "does not rebuild a tensor": b"c__torch__\nColour\n" + number(1) + b"\x85R",
    "does not rebuild": b"ctorch.jit._pickle\nbuild_intlist\n(]]tR",
    "not of a TorchScript class": b"ccollections\nOrderedDict\n)\x81",
    "not of a TorchScript": b"c__torch__\nNet\n" + number(1) + b"\x85\x81",
    "not a dict of attributes": MODULE + b"(" + number(1) + b"tb",
    "not a dict of": b"}}b",
    "set twice": module() + b"}b",
    "have no names": MODULE + b"}(" + number(1) + b"Nub",
    "not a storage": b"(" + text("code") + b"tQ",
    "instruction INST": b"(i__torch__\nNet\n",
    "instruction OBJ": b"(c__torch__\nNet\no",
    "instruction NEWOBJ_EX": b"c__torch__\nNet\n)}\x92",
    "holds no module": b"}" + text("w") + tensor() + b"s",
    "hold no tensor": module(a=module()),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_everything_but_modules_of_tensors_is_refused_by_name(tmp_path, reason: str) -> None:
    with pytest.raises(weights.WeightsError, match=reason):
        weights.read(program(tmp_path / "m.pt", REFUSED[reason]))


def test_a_module_in_a_file_of_torch_save_is_refused(tmp_path) -> None:
    path = archive(tmp_path / "m.pt", b"\x80\x02" + module(w=tensor()) + b".")
    with pytest.raises(weights.WeightsError, match=r"names __torch__.*Net"):
        weights.read(path)


@pytest.mark.parametrize("protocol", range(6))
def test_a_payload_never_runs_wherever_it_lies(tmp_path, protocol: int) -> None:
    target = tmp_path / "owned"
    pickled = pickle.dumps({"w": Payload(str(target))}, protocol)
    members = [("m/constants.pkl", b""), ("m/code/__torch__.py", b"")]
    with pytest.raises(weights.WeightsError, match="posix.system|refused"):
        weights.read(archive(tmp_path / "a.pt", pickled, extra=members))
    beside = [("m/code/__torch__.py.debug_pkl", pickled), ("m/extra/x.pkl", pickled)]
    found = weights.read(program(tmp_path / "b.pt", module(w=tensor()), extra=beside))
    np.testing.assert_array_equal(found["w"].ravel(), np.arange(6.0))
    assert not target.exists()
    pickle.loads(pickled)
    assert target.exists(), "the payload of this test must be a live one"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extra": [("m/code/../../evil.py", b"")]}, "not a plain relative path"),
        ({"extra": [("/evil.py", b"")]}, "not a plain relative path"),
        ({"compression": zipfile.ZIP_DEFLATED, "storage": bytes(10**7)}, "'m/data.* is compressed"),
        ({"storage": SIX[:-4]}, "should have 24 bytes and is 20 bytes"),
    ],
)
def test_a_wrong_archive_is_refused(tmp_path, options, message: str) -> None:
    with pytest.raises(weights.WeightsError, match=message):
        weights.read(program(tmp_path / "m.pt", module(w=tensor()), **options))


def test_members_that_share_bytes_are_refused(tmp_path) -> None:
    path = program(tmp_path / "m.pt", module(w=tensor()), extra=[("m/data/1", SIX)])
    content = path.read_bytes()
    # The directory entry of the second storage: its offset (16 bits suffice) and name of the first.
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(b"m/data/1"))
    first = content.rindex(b"PK\x01\x02", 0, content.rindex(b"m/data/0"))
    local = content.index(b"m/data/1")
    moved = bytearray(content)
    moved[entry + 42 : entry + 46] = content[first + 42 : first + 46]
    path.write_bytes(moved)
    with pytest.raises(weights.WeightsError, match="another name in its header|share bytes"):
        weights.read(path)
    moved = bytearray(content)
    # The first one as long as to reach into the second.
    reach = (local + 8 - content.index(SIX) + 4).to_bytes(4, "little")
    moved[first + 20 : first + 28] = reach * 2
    path.write_bytes(moved)
    with pytest.raises(weights.WeightsError, match="share bytes"):
        weights.read(path)


@FUZZ
@given(flips=FLIPS)
def test_damaged_programs_raise_only_weights_errors(tmp_path, flips) -> None:
    path = program(tmp_path / "m.pt", module(a=module(w=tensor()), b=tensor()))
    for _ in damaged(path, flips):
        opened(path)


def network(torch):
    """Every kind of thing that OpenAI's archives hold, small."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = torch.nn.MultiheadAttention(4, 2)
            self.ln_1 = torch.nn.LayerNorm(4)

        def forward(self, x):
            return x + self.attn(self.ln_1(x), self.ln_1(x), self.ln_1(x), need_weights=False)[0]

    class Tower(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = torch.nn.Conv2d(3, 4, 2, bias=False)
            self.bn1 = torch.nn.BatchNorm2d(4)
            self.proj = torch.nn.Parameter(torch.randn(4, 4).t())

        def forward(self, x):
            return self.bn1(self.conv1(x)).mean((2, 3)) @ self.proj

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = Tower()
            self.transformer = torch.nn.Sequential(Block(), Block())
            self.narrow = torch.nn.Linear(4, 4).half()
            self.register_buffer("input_resolution", torch.tensor(8))
            self.register_buffer("table", torch.arange(6, dtype=torch.int32).reshape(2, 3))
            self.logit_scale = torch.nn.Parameter(torch.tensor(2.5))
            self.depth = 2

        def forward(self, x):
            y = self.transformer(self.visual(x)[None]) * self.logit_scale.exp()
            return y + self.narrow.weight.float() + self.table.sum() * self.input_resolution

    return Net().eval()


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> dict[str, pathlib.Path]:
    """Files of torch.jit.save: one traced, one compiled from source."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    net, folder = network(torch), tmp_path_factory.mktemp("programs")
    made = {"trace": torch.jit.trace(net, torch.ones(4, 3, 8, 8)), "script": torch.jit.script(net)}
    for name, module_ in made.items():
        torch.jit.save(module_, folder / name)
    return {name: folder / name for name in made}


@pytest.mark.parametrize("kind", ["trace", "script"])
def test_programs_of_real_torch_give_their_state_dict_bit_for_bit(programs, kind: str) -> None:
    torch = pytest.importorskip("torch")
    wanted = torch.jit.load(programs[kind]).state_dict()
    found = weights.read(programs[kind])
    assert set(found) == set(wanted) and "transformer.1.attn.in_proj_weight" in found
    assert found.dtype("narrow.weight") == np.float16 and found.shape("input_resolution") == ()
    for name, value in wanted.items():
        value = value.detach().numpy()
        assert found.dtype(name) == value.dtype and found.shape(name) == value.shape
        assert found[name].tobytes() == value.tobytes(), name


def test_a_frozen_program_of_real_torch_is_refused_with_advice(programs, tmp_path) -> None:
    torch = pytest.importorskip("torch")
    frozen = torch.jit.freeze(torch.jit.load(programs["script"]).eval())
    torch.jit.save(frozen, tmp_path / "frozen.pt")
    with pytest.raises(weights.WeightsError, match="before it is frozen"):
        weights.read(tmp_path / "frozen.pt")
