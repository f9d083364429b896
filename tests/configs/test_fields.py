"""Configuration fields: what is refused, in which words, and what a config looks like."""

import pytest
from ml_collections import ConfigDict

from configs import fields
from configs.fields import COMMON, Field, FieldError, between, each, one_of, positive

SOME = {
    "count": Field(3, "things", positive),
    "model.rate": Field(0.5, "share", between(0, 1)),
    "model.kind": Field("a", "which", choices=("alpha", "a")),
    "model.layers": Field((1, 2), "indices", each(positive)),
    "model.on": Field(True, "switch"),
    "path": Field(None, "a file", kind=str),
    "limit": Field(None, "at most", positive, kind=int),
    "share": Field(0.5, "of all; none: no limit", positive, optional=True),
}


def test_a_config_nests_by_dots_and_refuses_new_names():
    config = fields.build(SOME, {"model.rate": 1})
    assert isinstance(config, ConfigDict)
    assert config.count == 3 and config.model.rate == 1.0 and config.model.layers == (1, 2)
    assert isinstance(config.model.rate, float)
    with pytest.raises(AttributeError):
        config.model.rat = 2


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("count", "12", 12),
        ("model.rate", "1", 1.0),
        ("model.rate", "2.5e-1", 0.25),
        ("model.on", "false", False),
        ("model.on", "1", True),
        ("model.layers", "3,4,5", (3, 4, 5)),
        ("model.layers", "(7,)", (7,)),
        ("model.layers", "", ()),
        ("path", "none", None),
        ("path", "a=b,c", "a=b,c"),
        ("limit", "None", None),
        ("limit", "4", 4),
        ("share", "none", None),
        ("share", "2", 2.0),
    ],
)
def test_text_becomes_the_value_it_says(name, text, value):
    parsed = SOME[name].parse(name, text)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("count", "0", "count=0: accepted is int, > 0 (things)"),
        ("count", "1e3", "count=1e3: accepted is int, > 0"),
        ("count", "none", "accepted is int"),
        ("model.rate", "nan", "accepted is float, 0 to 1"),
        ("model.rate", "1.5", "model.rate=1.5"),
        ("model.kind", "alpa", "accepted is alpha | a; nearest: alpha"),
        ("model.layers", "1,x", "tuple of int"),
        ("model.layers", "1,-2", "each: > 0"),
        ("model.on", "maybe", "accepted is bool"),
        ("limit", "-1", "int or None, > 0"),
    ],
)
def test_text_that_is_no_value_is_refused_in_words(name, text, said):
    with pytest.raises(FieldError) as error:
        SOME[name].parse(name, text)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [True, 2.0, "2", None, [2]])
def test_a_value_of_another_type_is_refused_for_an_int(value):
    with pytest.raises(FieldError, match="count="):
        fields.build(SOME, {"count": value})


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("optimizer.lr", "optimizer.learning_rate"),
        ("warmup_steps", "optimizer.warmup_steps"),
        ("optimiser.weight_decay", "optimizer.weight_decay"),
        ("batchsize", "batch_size"),
        ("mesh.devices", "mesh.device"),
    ],
)
def test_an_unknown_name_is_answered_with_the_one_meant(typo, meant):
    with pytest.raises(FieldError, match=rf"nearest: .*\b{meant}"):
        fields.build(COMMON, {"method": "vcc", typo: 1})


def test_presets_by_name():
    presets = {"quickstart": {"count": 5}, "large": {"count": 0}}
    assert fields.preset(SOME, presets).count == 5
    with pytest.raises(FieldError, match="unknown preset 'quick'; nearest: quickstart"):
        fields.preset(SOME, presets, "quick")
    with pytest.raises(FieldError, match="count=0"):
        fields.preset(SOME, presets, "large")


def test_flat_is_the_inverse_of_nesting():
    values = {name: field.default for name, field in SOME.items()}
    assert fields.flat(fields.build(SOME)) == values
    assert fields.flat({"a": {"b": {"c": 1}}, "d": {}}) == {"a.b.c": 1}


def test_a_field_of_two_groups_at_once_is_refused():
    with pytest.raises(FieldError, match="group"):
        fields.build({"model": Field(1, "x"), "model.width": Field(1, "y")})


def test_checks_say_what_they_accept():
    assert one_of(1, 2).accepted == "1 | 2"
    assert not one_of(1, 2).holds(3)
    with pytest.raises(TypeError, match="dict"):
        Field({}, "no such kind")


@pytest.mark.parametrize("name", ["vcc", "smile_2", "tests.train.toy", "A.b"])
def test_method_names_accepted(name):
    assert fields.build(COMMON, {"method": name}).method == name


@pytest.mark.parametrize("name", ["", "Vcc", "vcc/x", "os;rm", ".toy", "a..b", "../a"])
def test_method_names_refused(name):
    with pytest.raises(FieldError, match="method="):
        fields.build(COMMON, {"method": name})


def test_every_common_field_says_what_it_means():
    assert all(field.meaning for field in COMMON.values())
    wanted = "seed total_steps batch_size eval_every checkpoint_every log_every warm_start"
    assert set(wanted.split()) | {"mesh.node", "mesh.device", "data.dir"} <= COMMON.keys()
