"""NumPy's .npz files: every array comes out right, and nothing that a file claims is believed."""

import io
import pickle
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given

from jaxmodels import weights
from jaxmodels.weights import npz_file
from tests.weights.archives import FLIPS, FUZZ, Payload, archive, damaged, named, opened, tensor

SAVE = pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
ARRAYS = {
    "embedding/kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "Transformer/encoderblock_0/LayerNorm_0/bias": np.arange(3, dtype=">f4"),
    "fortran": np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)),
    "bfloat16": np.asfortranarray(np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)),
    "scalar": np.float16(3),
    "opt/step": np.array(2**40 + 1, ">i8"),
    "empty": np.zeros((0, 3), np.float32),
    "bool": np.array([True, False]),
    "uint16": np.arange(3, dtype=np.uint16),
}


def header(descr: str = "'<f4'", shape: str = "(2,)", order: str = "False", version=b"\1\0"):
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    length = len(text).to_bytes(2 if version == b"\1\0" else 4, "little")
    return b"\x93NUMPY" + version + length + text


def npz(path, *contents: bytes, compression: int = zipfile.ZIP_STORED, names="abc"):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in zip(names, contents, strict=False):
            file.writestr(f"{name}.npy", content)
    return path


@SAVE
def test_all_arrays_are_read_exactly_in_this_machines_order(tmp_path, save) -> None:
    save(tmp_path / "vit.npz", **ARRAYS)
    found = weights.read(tmp_path / "vit.npz")
    assert list(found) == list(ARRAYS)
    for name, value in ARRAYS.items():
        assert found.shape(name) == found[name].shape == value.shape
        assert found.dtype(name) == found[name].dtype == value.dtype.newbyteorder("=")
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_stored_arrays_are_views_of_the_file_and_no_header_reads_values(tmp_path) -> None:
    big = np.ones((1000, 1000), np.float32)
    np.savez(tmp_path / "a.npz", c=big, f=np.asfortranarray(big))
    np.savez_compressed(tmp_path / "b.npz", c=np.random.default_rng(0).normal(size=10**6))
    tracemalloc.start()
    try:
        found, packed = weights.read(tmp_path / "a.npz"), weights.read(tmp_path / "b.npz")
        sums = [found[name].sum() for name in found]
        assert packed.shape("c") == (10**6,)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sums == [1e6, 1e6] and peak < 2**20
    assert not found["c"].flags.writeable and found["f"].flags.f_contiguous


@pytest.mark.parametrize("descr", ["'|V2'", "'<V2'"])
def test_two_bytes_of_no_type_are_bfloat16(tmp_path, descr: str) -> None:
    values = np.array([1.5, -2.0]).astype(ml_dtypes.bfloat16)
    found = weights.read(npz(tmp_path / "a.npz", header(descr) + values.tobytes()))
    assert found.dtype("a") == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found["a"], values)


def test_headers_of_version_2_and_of_old_pythons_are_read(tmp_path) -> None:
    values = np.float32([1, 2]).tobytes()
    two, old = header(version=b"\2\0") + values, header(shape="(2L, 1L)") + values
    found = weights.read(npz(tmp_path / "a.npz", two, old))
    np.testing.assert_array_equal(found["a"], [1, 2])
    np.testing.assert_array_equal(found["b"], [[1], [2]])


@SAVE
def test_arrays_of_objects_are_refused_and_their_pickle_never_runs(tmp_path, save) -> None:
    target = tmp_path / "owned"
    payload = np.array([Payload(str(target))], dtype=object)
    save(tmp_path / "a.npz", good=np.ones(2), bad=payload)
    with pytest.raises(weights.WeightsError, match="'bad.npy'.*Python objects.*refused"):
        weights.read(tmp_path / "a.npz")
    pickled = pickle.dumps(payload)
    for content in (header() + pickled, pickled):
        with pytest.raises(weights.WeightsError):
            weights.read(npz(tmp_path / "b.npz", content))
    assert not target.exists()
    pickle.loads(pickled)
    assert target.exists(), "the payload of this test must be a live one"


EIGHT = bytes(8)
BAD = {
    "should take": header(shape="(3,)") + EIGHT,
    "should take 4611": header(shape="(1073741824, 1073741824)") + EIGHT,
    "should take .* bytes": header() + EIGHT + b"\0",
    "can have the shape": header(shape="(0, 4611686018427387904)"),
    "can have the": header(shape="(" + "1, " * 40 + ")") + EIGHT,
    "not one of NumPy's": header(shape="(-2,)") + EIGHT,
    "not one of NumPy": header(shape="(2**9,)") + EIGHT,
    "cut or not": header(descr="__import__('os').system('true')") + EIGHT,
    "is cut": header()[:30],
    "header is cut\\.": header()[:9],
    "no .npy array": b"hello" * 9,
    "version 1 or 2": header(version=b"\3\0") + EIGHT,
    "holds '<U4': refused": header(descr="'<U4'") + EIGHT * 4,
    "holds '<c8'": header(descr="'<c8'") + EIGHT * 2,
    "holds '|V1'": header(descr="'|V1'") + EIGHT,
    "holds .*'a', '<f4'": header(descr="[('a', '<f4')]") + EIGHT,
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_wrong_array_is_refused_by_name(tmp_path, message: str, compression: int) -> None:
    path = npz(tmp_path / "a.npz", BAD[message], compression=compression)
    with pytest.raises(weights.WeightsError, match=f"a.npy.*{message}"):
        weights.read(path)


def test_an_empty_array_of_absurd_shape_raises_only_weights_errors(tmp_path) -> None:
    path = npz(tmp_path / "a.npz", header(shape="(0, 2305843009213693952)"))
    with pytest.raises(weights.WeightsError, match="does not fit"):
        weights.read(path)["a"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["../evil"], "not a plain relative path"),
        (["/etc/evil"], "not a plain relative path"),
        (["a\\b"], "not a plain relative path"),
        (["a", "a"], "occurs twice"),
    ],
)
def test_a_wrong_name_is_refused(tmp_path, names: list[str], message: str) -> None:
    good = header() + EIGHT
    with pytest.raises(weights.WeightsError, match=message):
        weights.read(npz(tmp_path / "a.npz", good, good, names=names))


def test_members_that_are_no_arrays_or_links_are_refused(tmp_path) -> None:
    link = zipfile.ZipInfo("link.npy")
    link.external_attr = 0o120777 << 16
    for member, message in ((link, "symbolic link"), ("readme.txt", "is no .npy array")):
        path = npz(tmp_path / "a.npz", header() + EIGHT)
        with zipfile.ZipFile(path, "a") as file:
            file.writestr(member, header() + EIGHT)
        with pytest.raises(weights.WeightsError, match=message):
            weights.read(path)


def test_a_checkpoint_of_torch_is_told_from_an_npz(tmp_path) -> None:
    path = archive(tmp_path / "m.npz", named(tensor()), extra=[("m/notes.npy", b"")])
    assert list(weights.read(path)) == ["w"]
    with pytest.raises(weights.WeightsError, match="no .npy array"):
        npz_file.read_npz(path)


def refused_cheaply(path, message: str, name: str | None = None) -> None:
    """Refused at once (name: at the access of that array), with hardly any memory taken."""
    found = weights.read(path) if name else None
    tracemalloc.start()
    try:
        with pytest.raises(weights.WeightsError, match=message):
            found[name] if name else weights.read(path)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


def test_a_bomb_is_refused_before_anything_is_inflated(tmp_path) -> None:
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        with file.open("a.npy", "w") as member:
            member.write(header(descr="'|u1'", shape="(100000000,)"))
            for _ in range(100):
                member.write(bytes(10**6))
    assert path.stat().st_size < 2**18
    refused_cheaply(path, "claim 1000000.. bytes.*refused")


@pytest.mark.parametrize("claimed", [1000, 10**6 + 100])
def test_an_array_that_inflates_to_another_size_stops_there(tmp_path, claimed: int) -> None:
    start = header(descr="'|u1'", shape=f"({claimed},)")
    path = npz(tmp_path / "a.npz", start + bytes(10**6), compression=zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    real = (len(start) + 10**6).to_bytes(4, "little")
    place = content.rindex(real)  # in the directory, which is what counts
    content[place : place + 4] = (len(start) + claimed).to_bytes(4, "little")
    path.write_bytes(content)
    refused_cheaply(
        path, "should inflate to .* bytes and does not", "a" if claimed > 10**5 else None
    )


def test_other_compressions_and_encryption_are_refused(tmp_path) -> None:
    path = npz(tmp_path / "a.npz", header() + EIGHT, compression=zipfile.ZIP_LZMA)
    with pytest.raises(weights.WeightsError, match="compressed by method 14"):
        weights.read(path)
    content = bytearray(npz(path, header() + EIGHT).read_bytes())
    content[6] |= 1
    path.write_bytes(content)
    with pytest.raises(weights.WeightsError, match="encrypted"):
        weights.read(path)


@SAVE
@FUZZ
@given(flips=FLIPS)
def test_a_damaged_file_gives_the_right_values_or_an_error(tmp_path, save, flips) -> None:
    buffer = io.BytesIO()
    save(buffer, **ARRAYS)
    path = tmp_path / "a.npz"
    path.write_bytes(buffer.getvalue())
    for _ in damaged(path, flips):
        for name, value in (opened(path) or {}).items():
            np.testing.assert_array_equal(value, ARRAYS[name])
