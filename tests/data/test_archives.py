"""Archives of strangers: plain ones come out whole, all others leave nothing behind."""

import io
import os
import pathlib
import struct
import tarfile
import zipfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxmodels.data import archives
from jaxmodels.data.archives import ArchiveError, extract

FILES = {"a.txt": b"one", "deep/er/b.bin": bytes(range(256)) * 9000, "deep/empty": b""}
MODES = {"plain.tar": "w", "z.tar.gz": "w:gz", "b.tar.bz2": "w:bz2", "x.tar.xz": "w:xz"}


def make_zip(path: pathlib.Path, files: dict[str, bytes] = FILES) -> pathlib.Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("deep/", b"")
        for name, content in files.items():
            file.writestr(name, content)
    return path


def make_tar(path: pathlib.Path, files: dict[str, bytes] = FILES, mode: str = "w") -> pathlib.Path:
    with tarfile.open(path, mode) as file:
        folder = tarfile.TarInfo("./deep")
        folder.type = tarfile.DIRTYPE
        file.addfile(folder)
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("name", ["any.zip", *MODES])
def test_files_come_out_whole_and_private_bits_do_not(tmp_path: pathlib.Path, name: str) -> None:
    path = tmp_path / name
    make_zip(path) if name == "any.zip" else make_tar(path, mode=MODES[name])
    path = path.rename(tmp_path / "download")  # told by content, never by name
    found = extract(path, tmp_path / "out" / "here", max_bytes=10**7)
    root = tmp_path / "out" / "here"
    assert found == sorted(root / name for name in FILES)
    assert {str(p.relative_to(root)): p.read_bytes() for p in found} == FILES
    assert os.listdir(tmp_path / "out") == ["here"]
    with pytest.raises(ValueError, match="exists and is not empty"):
        extract(path, root, max_bytes=10**7)


def test_long_names_of_tar_files_are_read(tmp_path: pathlib.Path) -> None:
    name = "/".join(["long" * 20] * 6)
    path = make_tar(tmp_path / "t", {name: b"1"})
    assert extract(path, tmp_path / "out", max_bytes=9) == [tmp_path / "out" / name]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "neither a zip"),
        (b"garbage" * 99, "neither a zip"),
        (b"PK\x03\x04garbage", "damaged, or cut"),
        (b"\x1f\x8bgarbage", "damaged, or cut"),
        (b"BZhgarbage", "damaged, or cut"),
        (b"<html>Quota exceeded</html>", "neither a zip"),
    ],
)
def test_what_is_no_archive_says_so(tmp_path: pathlib.Path, content: bytes, message: str) -> None:
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(ArchiveError, match=message):
        extract(tmp_path / "f", tmp_path / "out", max_bytes=9)
    assert os.listdir(tmp_path) == ["f"]
    with pytest.raises(ArchiveError, match="no such file"):
        extract(tmp_path / "absent", tmp_path / "out", max_bytes=9)


@pytest.mark.parametrize("name", ["any.zip", *MODES])
def test_a_cut_archive_leaves_nothing(tmp_path: pathlib.Path, name: str) -> None:
    path = tmp_path / name
    make_zip(path) if name == "any.zip" else make_tar(path, mode=MODES[name])
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3 // 512 * 512 + 7])
    with pytest.raises(ArchiveError, match="nothing was unpacked"):
        extract(path, tmp_path / "out", max_bytes=10**7)
    assert os.listdir(tmp_path) == [name]


def test_a_flipped_byte_in_a_zip_is_found_while_writing(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a", b"x" * 1000)
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArchiveError, match="CRC"):
        extract(path, tmp_path / "out", max_bytes=10**7)
    assert os.listdir(tmp_path) == ["a.zip"]


def test_a_huge_header_of_a_tar_file_is_not_read(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "t.tar.gz"
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as file:
        info = tarfile.TarInfo("a")
        info.pax_headers = {"comment": "x" * (8 * archives._OVERHEAD)}
        file.addfile(info)
    with pytest.raises(ArchiveError, match="header of more than"):
        extract(path, tmp_path / "out", max_bytes=10**9)


def test_a_zip_whose_header_lies_about_a_size_is_refused(tmp_path: pathlib.Path) -> None:
    path = make_zip(tmp_path / "a.zip", {"a": b"0" * 100_000})
    content = path.read_bytes().replace(struct.pack("<I", 100_000), struct.pack("<I", 10))
    path.write_bytes(content)
    with pytest.raises(ArchiveError, match="nothing was unpacked"):
        extract(path, tmp_path / "out", max_bytes=100)
    assert os.listdir(tmp_path) == ["a.zip"]


@settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    kind=st.sampled_from(["any.zip", *MODES]),
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=9),
)
def test_damage_of_any_kind_raises_archive_errors_only(tmp_path, kind, flips) -> None:
    path = tmp_path / kind
    files = {"a": b"one", "b/c": bytes(range(200))}
    make_zip(path, files) if kind == "any.zip" else make_tar(path, files, MODES[kind])
    content = bytearray(path.read_bytes())
    for place, value in flips:
        content[place % len(content)] = value
    path.write_bytes(content)
    out = tmp_path / "out"
    try:
        for file in extract(path, out, max_bytes=10**6):
            assert out in file.parents
            file.unlink()
        for folder in sorted((p for p in out.rglob("*")), reverse=True):
            folder.rmdir()
        out.rmdir()
    except ArchiveError:
        pass
    path.unlink()
    assert not os.listdir(tmp_path)
