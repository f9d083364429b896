"""Checks of fields: what passes unchanged, and what is said about what does not."""

import numpy as np
import pytest

from jaxmodels.data.checks import check_field, check_text, decoding

RECORD = {"x": [[1.0, 2.0]], "n": 3, "flag": True, "nan": [0.0, np.nan], "text": "aé", "none": None}


def test_good_fields_come_back_as_they_are() -> None:
    assert check_field(RECORD, "x", kinds="f", shape=(1, None), low=1, high=2).tolist() == [[1, 2]]
    assert check_field(RECORD, "x", shape=(-3, 2)).shape == (1, 2)
    assert check_field(RECORD, "n", kinds="iu", shape=()) == 3
    assert check_field(RECORD, "flag", kinds="b").dtype == bool
    assert check_text(RECORD, "text", 2) == "aé"
    assert check_text({"b": "aé".encode()}, "b") == "aé"
    with decoding("x", "a number"):
        int("3")


@pytest.mark.parametrize(
    ("name", "wanted", "said"),
    [
        ("y", {}, "field 'y' is missing; the record has 'flag', 'n', 'nan', 'none', 'text', 'x'"),
        ("none", {}, "field 'none' is missing"),
        ("text", {}, "field 'text' is of type <U2: booleans or integers or floats are accepted"),
        ("n", {"kinds": "f"}, "field 'n' is of type int64: floats are accepted"),
        ("x", {"shape": (2,)}, r"field 'x' has shape \[1, 2\]: \[2\] is accepted"),
        ("x", {"shape": (None, -1)}, r"field 'x' has shape \[1, 2\]: \[any, 1 to 1\] is accepted"),
        ("x", {"low": 1.5}, "field 'x' holds 1.0: 1.5 or more is accepted"),
        ("x", {"high": 1}, "field 'x' holds 2.0: 1 or less is accepted"),
        ("n", {"low": 0, "high": 2}, "field 'n' holds 3: 0 to 2 is accepted"),
        ("nan", {}, "field 'nan' holds nan: any finite number is accepted"),
    ],
)
def test_bad_numbers_are_named_with_what_is_accepted(name, wanted, said) -> None:
    with pytest.raises(ValueError, match=f"^{said}"):
        check_field(RECORD, name, **wanted)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (" \n", "field 't' is empty: 1 to 3 characters are accepted"),
        (b"a\xff", "field 't' holds byte 0xff at 1: UTF-8 text is accepted"),
        (3, "field 't' is of type int: text is accepted"),
        ("four", "field 't' has 4 characters: 1 to 3 characters are accepted"),
    ],
)
def test_bad_text_is_named_with_what_is_accepted(value, said) -> None:
    with pytest.raises(ValueError, match=f"^{said}$"):
        check_text({"t": value}, "t", longest=3)


def test_a_record_without_fields_says_what_it_is() -> None:
    with pytest.raises(ValueError, match="a record with fields is needed, this is a list"):
        check_field([1, 2], "x")


@pytest.mark.parametrize("error", [OSError("cut"), EOFError("cut"), ValueError("cut"), KeyError(1)])
def test_what_a_decoder_raises_is_the_fields_fault(error: Exception) -> None:
    said = r"field 'image' cannot be decoded \(\w+: .*\): a PNG image is accepted"
    with pytest.raises(ValueError, match=said), decoding("image", "a PNG image"):
        raise error


def test_a_bug_of_the_decoder_stays_what_it_is() -> None:
    with pytest.raises(AttributeError), decoding("image", "a PNG image"):
        raise AttributeError("typo")
