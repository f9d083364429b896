"""Published JSON files as sources: lines, lists, archives, and what is wrong with them."""

import io
import json
import pathlib
import pickle
import zipfile

import pytest

from jaxmodels.data import json_records


def test_lines_are_read_by_number_and_know_their_place(tmp_path: pathlib.Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text('{"x": 1}\n\n{"x": "ü"}\n', "utf-8")
    second.write_text('{"x": 3}', "utf-8")
    source = json_records.JsonLines([first, second])
    assert [source[i]["x"] for i in range(len(source))] == [1, "ü", 3]
    assert source.where(1) == f"{first}, line 3"
    again = pickle.loads(pickle.dumps(source))
    assert again[2] == {"x": 3} and again.fingerprint == source.fingerprint
    second.write_text('{"x": 4}', "utf-8")
    assert json_records.JsonLines([first, second]).fingerprint != source.fingerprint


def test_a_bad_line_is_an_error_of_that_record_alone(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"x": 1}\n{"x": \n[1]\n{"x": "\xff"}\n')
    source = json_records.JsonLines([path])
    assert source[0] == {"x": 1}
    for index, message in ((1, "not JSON"), (2, "a JSON list: an object"), (3, "not JSON")):
        with pytest.raises(ValueError, match=message):
            source[index]
    with pytest.raises(IndexError, match="record 4 of 4"):
        source[4]


def test_missing_and_empty_files_are_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        json_records.JsonLines([tmp_path / "absent.jsonl"])
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no line in it"):
        json_records.JsonLines([tmp_path / "empty.jsonl"])


def test_elements_longer_than_what_is_read_at_once_are_whole() -> None:
    wanted = [{"x": "y" * 1_500_000, "z": [1, {"a": "]"}]}, {"x": ""}, [], {"x": "end"}]
    file = io.StringIO("\ufeff \n" + json.dumps(wanted, indent=1))
    assert list(json_records.array_elements(file, "f")) == wanted
    assert list(json_records.array_elements(io.StringIO("[]"), "f")) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"x": 1}', "a JSON list is needed"),
        ('[{"x": 1}, {"x"', "element 1 cannot be read"),
        ('[{"x": 1}', "element 1 cannot be read"),
        ('[{"x": 1}, nonsense]', "element 1 cannot be read"),
    ],
)
def test_a_cut_or_damaged_list_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(json_records.array_elements(io.StringIO(text), "f"))


def test_a_list_is_rewritten_once_and_filtered_by_name(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "list.json"
    path.write_text(json.dumps([{"id": i} for i in range(5)]), "utf-8")
    data_dir = tmp_path / "data"
    assert len(json_records.open_array(path, data_dir=data_dir)) == 5
    odd = json_records.open_array(
        path, data_dir=data_dir, keep=lambda record: record["id"] % 2 == 1, kept="odd"
    )
    assert [odd[i]["id"] for i in range(len(odd))] == [1, 3]
    assert odd.where(1) == f"{path}, line 2"
    assert len(list((data_dir / "json_records").glob("[0-9a-f]*"))) == 2
    path.write_text("[1]", "utf-8")
    with pytest.raises(ValueError, match="element 0 is no object"):
        json_records.open_array(path, data_dir=data_dir)


def test_a_member_of_an_archive_is_read_and_an_absent_one_named(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "qasper.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("qasper/train.jsonl", '{"x": 1}\n{"x": 2}\n')
    source = json_records.open_member(path, "qasper/train.jsonl", data_dir=tmp_path / "data")
    assert [source[0]["x"], source[1]["x"]] == [1, 2]
    with pytest.raises(ValueError, match="no member qasper/dev.jsonl"):
        json_records.open_member(path, "qasper/dev.jsonl", data_dir=tmp_path / "data")
    with pytest.raises(ValueError, match="no such file"):
        json_records.open_member(tmp_path / "no.zip", "x", data_dir=tmp_path / "data")
