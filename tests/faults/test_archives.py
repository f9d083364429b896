"""Hostile archives: nothing is written before every member is known to be harmless (F38)."""

import io
import pathlib
import tarfile
import zipfile
from collections.abc import Callable

import pytest

from jaxmodels.data.archives import ArchiveError, extract

NAMES = {
    "dots": ("../evil", "name of member '../evil' is refused"),
    "dots inside": ("a/../../evil", "is refused: only plain relative paths"),
    "absolute": ("/tmp/evil-of-f38", "is refused: only plain relative paths"),
    "drive": ("C:/evil", "is refused: only plain relative paths"),
    "backslash": ("..\\evil", "is refused: only plain relative paths"),
    "no name": ("./", "is refused: only plain relative paths"),
    "control": ("evil\nname", "is refused: only plain relative paths"),
    "long": ("e" * 300, "is refused: only plain relative paths"),
    "twice": ("good.txt", "'good.txt' occurs twice"),
    "file as folder": ("good.txt/evil", "'good.txt' is a file and a folder"),
}


def as_zip(path: pathlib.Path, name: str, content: bytes = b"evil", mode: int = 0) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("good.txt", b"good")
        info = zipfile.ZipInfo(name)
        info.external_attr, info.compress_type = mode << 16, zipfile.ZIP_DEFLATED
        file.writestr(info, content)


def as_tar(
    path: pathlib.Path, name: str, content: bytes = b"evil", kind: bytes = tarfile.REGTYPE,
    target: str = "",
) -> None:  # fmt: skip
    with tarfile.open(path, "w:gz") as file:
        good = tarfile.TarInfo("good.txt")
        good.size = 4
        file.addfile(good, io.BytesIO(b"good"))
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        info.size = len(content) if kind == tarfile.REGTYPE else 0
        file.addfile(info, io.BytesIO(content))


def refused(tmp_path: pathlib.Path, said: str, **limits: int) -> None:
    """Extraction fails, and leaves the whole folder as it was."""
    inside = tmp_path / "inside"
    inside.mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ArchiveError, match=said):
        extract(tmp_path / "archive", inside / "out", **({"max_bytes": 10**6} | limits))
    assert sorted(tmp_path.rglob("*")) == before
    assert not pathlib.Path("/tmp/evil-of-f38").exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("make", [as_zip, as_tar])
@pytest.mark.parametrize("kind", NAMES)
def test_f38_a_name_that_leaves_the_folder_is_refused_before_any_write(
    tmp_path: pathlib.Path, make: Callable[..., None], kind: str
) -> None:
    name, said = NAMES[kind]
    if kind == "no name":  # "./" is a folder; as the name of a file it means nothing
        name = "." if make is as_tar else "/."
    make(tmp_path / "archive", name)
    refused(tmp_path, said)


@pytest.mark.parametrize(
    ("mode", "said"),
    [(0o120777, "a symbolic link"), (0o020666, "a device or pipe"), (0o010666, "a device or pipe")],
)
def test_f38_links_and_devices_of_a_zip_are_refused(
    tmp_path: pathlib.Path, mode: int, said: str
) -> None:
    as_zip(tmp_path / "archive", "evil", b"/etc/passwd", mode)
    refused(tmp_path, f"member 'evil' is {said}: refused")


@pytest.mark.parametrize(
    ("kind", "target", "said"),
    [
        (tarfile.SYMTYPE, "/etc/passwd", "a link to '/etc/passwd'"),
        (tarfile.SYMTYPE, "../..", r"a link to '\.\./\.\.'"),
        (tarfile.LNKTYPE, "good.txt", "a link to 'good.txt'"),
        (tarfile.CHRTYPE, "", "a device, pipe or sparse file"),
        (tarfile.FIFOTYPE, "", "a device, pipe or sparse file"),
    ],
)
def test_f38_links_and_devices_of_a_tar_are_refused(
    tmp_path: pathlib.Path, kind: bytes, target: str, said: str
) -> None:
    as_tar(tmp_path / "archive", "evil", kind=kind, target=target)
    refused(tmp_path, f"member 'evil' is {said}: refused")


@pytest.mark.parametrize("make", [as_zip, as_tar])
def test_f38_a_bomb_is_refused_by_the_size_it_unpacks_to(
    tmp_path: pathlib.Path, make: Callable[..., None]
) -> None:
    make(tmp_path / "archive", "bomb", bytes(50 * 2**20))
    assert (tmp_path / "archive").stat().st_size < 10**5
    refused(tmp_path, r"it unpacks to more than the 1000000 bytes .* up to 'bomb'")


@pytest.mark.parametrize("make", [as_zip, as_tar])
def test_f38_more_files_than_allowed_are_refused(
    tmp_path: pathlib.Path, make: Callable[..., None]
) -> None:
    make(tmp_path / "archive", "second")
    refused(tmp_path, "or 1 files allowed", max_files=1)


def test_f38_a_bomb_behind_a_small_header_stops_at_the_limit(tmp_path: pathlib.Path) -> None:
    as_zip(tmp_path / "archive", "bomb", bytes(5 * 2**20))
    content = (tmp_path / "archive").read_bytes()
    size = (5 * 2**20).to_bytes(4, "little")
    assert content.count(size) == 2
    (tmp_path / "archive").write_bytes(content.replace(size, (100).to_bytes(4, "little")))
    refused(tmp_path, "nothing was unpacked")
