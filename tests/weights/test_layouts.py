"""Layout changes, packed tensors, stages and trees without a template: exact, complete, refused."""

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxmodels import weights
from jaxmodels.core import params as params_lib
from jaxmodels.weights import IDENTITY, TRANSPOSE, Part, Rule, rules, transforms

TRANSFORMS = {
    "identity": (IDENTITY, (3, 2), (3, 2)),
    "transpose": (TRANSPOSE, (3, 2), (2, 3)),
    "conv_1d": (transforms.CONV_1D, (8, 3, 5), (5, 3, 8)),
    "conv_2d": (transforms.CONV_2D, (8, 3, 5, 7), (5, 7, 3, 8)),
    "conv_3d": (transforms.CONV_3D, (8, 3, 2, 5, 7), (2, 5, 7, 3, 8)),
    "class_token": (transforms.squeeze(0, 1), (1, 1, 6), (6,)),
    "position_table": (transforms.squeeze(0), (1, 4, 6), (4, 6)),
    "middle": (transforms.squeeze(1, 3), (2, 1, 6, 1), (2, 6)),
    "head_kernel": (transforms.merge_axes(1, leading=2), (6, 2, 3), (6, 6)),
    "head_bias": (transforms.merge_axes(0, leading=2), (2, 3), (6,)),
    "out_kernel": (transforms.merge_axes(0, leading=2), (2, 3, 5), (6, 5)),
    "chain": (transforms.chain(transforms.squeeze(0), TRANSPOSE), (1, 4, 6), (6, 4)),
}
# Every bit pattern counts: quiet and signalling NaNs with payloads, both zeros, subnormals.
BITS = {
    np.dtype(np.float32): [0x7FC01234, 0x7F801234, 0xFFC00001, 0x80000000, 1],
    np.dtype(np.float16): [0x7E12, 0x7C12, 0xFE01, 0x8000, 1],
    np.dtype(ml_dtypes.bfloat16): [0x7FC1, 0x7F81, 0xFFC1, 0x8000, 1],
}


def bits(shape, dtype, seed: int = 0) -> np.ndarray:
    """Random bit patterns, the odd ones of `BITS` among them."""
    unsigned = np.dtype(f"u{dtype.itemsize}")
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 2 ** (8 * dtype.itemsize), shape, unsigned)
    odd = BITS[dtype][: values.size]
    values.reshape(-1)[: len(odd)] = odd
    return values.view(dtype)


def assert_same_bits(found, wanted) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        assert np.ascontiguousarray(found[name]).tobytes() == value.tobytes(), name


def round_trip(tensors, table):
    params = weights.import_tree(tensors, table)
    assert_same_bits(weights.export_weights(params, table), tensors)
    return params


@pytest.mark.parametrize("dtype", BITS, ids=str)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_each_layout_change_keeps_every_bit_both_ways(name: str, dtype) -> None:
    transform, foreign, ours = TRANSFORMS[name]
    assert transform.target_shape(foreign) == ours and transform.source_shape(ours) == foreign
    table = [Rule("x", "x", transform), Rule("n.{i}.x", "n/x", transform)]
    tensors = {key: bits(foreign, dtype, seed) for seed, key in enumerate(["x", "n.0.x", "n.1.x"])}
    params = round_trip(tensors, table)
    assert params["x"].shape == ours and params["n"]["x"].shape == (2, *ours)


def test_layouts_put_values_where_flax_wants_them() -> None:
    kernel = np.arange(120.0).reshape(2, 3, 4, 5)
    moved = transforms.CONV_2D.forward(kernel)
    assert moved[3, 4, 2, 1] == kernel[1, 2, 3, 4]
    heads = np.arange(24.0).reshape(2, 3, 4)
    assert transforms.merge_axes(1, leading=3).forward(heads)[1, 2 * 4 + 3] == heads[1, 2, 3]


@pytest.mark.parametrize(
    ("transform", "shape"),
    [
        (transforms.CONV_2D, (3, 3)),
        (transforms.squeeze(0), (2, 3)),
        (transforms.squeeze(2), (2, 3)),
        (transforms.merge_axes(0, leading=4), (2, 3)),
    ],
)
def test_a_tensor_that_cannot_take_its_layout_is_named(transform, shape) -> None:
    tensors = {"x.weight": np.zeros(shape, np.float32)}
    with pytest.raises(weights.WeightsError, match=r"misshapen: x.weight -> our x/kernel: "):
        weights.import_tree(tensors, [Rule("x.weight", "x/kernel", transform)])


QKV = [f"layers/attention/{name}" for name in ("query", "key", "value")]
PACKED = [
    *rules.packed("b.{i}.in_proj_weight", [f"{path}/kernel" for path in QKV], TRANSPOSE),
    *rules.packed("b.{i}.in_proj_bias", [f"{path}/bias" for path in QKV]),
]


def packed_tensors(depth: int = 2, dtype=np.float32) -> dict[str, np.ndarray]:
    tensors = {}
    for i in range(depth):
        tensors[f"b.{i}.in_proj_weight"] = bits((12, 4), np.dtype(dtype), i)
        tensors[f"b.{i}.in_proj_bias"] = bits((12,), np.dtype(dtype), 9 + i)
    return tensors


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_thirds_of_a_packed_tensor_become_three_leaves_and_join_again(dtype) -> None:
    tensors = packed_tensors(dtype=dtype)
    attention = round_trip(tensors, PACKED)["layers"]["attention"]
    for n, name in enumerate(("query", "key", "value")):
        third = tensors["b.1.in_proj_weight"][4 * n : 4 * n + 4].T
        assert attention[name]["kernel"][1].tobytes() == third.tobytes()


def test_parts_on_another_axis_and_of_unequal_size() -> None:
    table = rules.packed("c_attn", ["q", "k", "v"], axis=1, shares=(4, 1, 1))
    tensors = {"c_attn": bits((3, 12), np.dtype(np.float32))}
    params = round_trip(tensors, table)
    assert [params[name].shape for name in "qkv"] == [(3, 8), (3, 2), (3, 2)]
    np.testing.assert_array_equal(params["v"], tensors["c_attn"][:, 10:])


def template(tree, dtype=np.float32):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), tree)


def test_a_packed_tensor_of_another_size_and_a_model_without_a_part_are_refused() -> None:
    tensors = packed_tensors()
    wanted = template(weights.import_tree(tensors, PACKED))
    del wanted["layers"]["attention"]["value"]
    tensors["b.1.in_proj_bias"] = np.zeros(13, np.float32)
    with pytest.raises(weights.WeightsError) as error:
        weights.import_weights(wanted, tensors, PACKED)
    assert list(error.value.problems) == [
        "incomplete: b.{i}.in_proj_bias is read for other leaves, but the model has no place for "
        "its part 3 of 3 at layers/attention/value/bias",
        "incomplete: b.{i}.in_proj_weight is read for other leaves, but the model has no place for "
        "its part 3 of 3 at layers/attention/value/kernel",
        "misshapen: b.1.in_proj_bias -> our layers/attention/key/bias: found shape (13,), "
        "wanted (12,)",
        "misshapen: b.1.in_proj_bias -> our layers/attention/query/bias: found shape (13,), "
        "wanted (12,)",
    ]


def test_export_refuses_absent_parts_and_parts_that_do_not_fit_together() -> None:
    params = weights.import_tree(packed_tensors(1), PACKED)
    attention = params["layers"]["attention"]
    del attention["key"]["bias"]
    attention["value"]["kernel"] = np.zeros((1, 4, 5), np.float32)
    with pytest.raises(weights.WeightsError) as error:
        weights.export_weights(params, PACKED)
    assert len(error.value.problems) == 2
    assert "b.0.in_proj_bias: parts [2] of 3 are absent" in str(error.value)
    assert "b.0.in_proj_weight: its parts do not fit together" in str(error.value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (PACKED[:2], r"give parts \[0, 1\] of 3"),
        ([*PACKED[:3], PACKED[0]], "would be written twice|give parts"),
        ([*PACKED[:2], Rule("b.{i}.in_proj_weight", "v", part=Part(2, (1, 1, 1), 1))], "differ in"),
    ],
)
def test_a_table_with_wrong_parts_is_refused_whichever_way_it_is_used(table, message) -> None:
    tensors = {k: v for k, v in packed_tensors(1).items() if "weight" in k}
    with pytest.raises(weights.WeightsError, match=message):
        weights.import_tree(tensors, table)
    with pytest.raises(weights.WeightsError, match=message):
        weights.export_weights({}, table)


def test_parts_and_shares_that_cannot_be_are_refused() -> None:
    for wrong in ((3, (1, 1, 1)), (0, (0, 1)), (-1, (1, 1))):
        with pytest.raises(ValueError, match="index one of"):
            Part(*wrong)
    with pytest.raises(weights.WeightsError, match="2 leaves, but shares"):
        rules.packed("x", ["a", "b"], shares=(1, 1, 1))
    with pytest.raises(ValueError, match="name each axis"):
        transforms.permute(0, 2)


def test_stages_become_stacks_of_their_own_depth() -> None:
    rule = Rule("layers.{s}.blocks.{i}.norm.weight", "stages_{s}/layers/norm/scale")
    table = rules.per_stage([rule], range(2))
    depths = (2, 3)
    tensors = {
        f"layers.{s}.blocks.{i}.norm.weight": bits((4 * s + 4,), np.dtype(np.float32), 10 * s + i)
        for s, depth in enumerate(depths)
        for i in range(depth)
    }
    params = round_trip(tensors, table)
    for s, depth in enumerate(depths):
        assert params[f"stages_{s}"]["layers"]["norm"]["scale"].shape == (depth, 4 * s + 4)


def test_a_stack_may_take_only_some_foreign_layers() -> None:
    table = [
        Rule("b.{i}.w", "even/w", layers=(0, 2)),
        Rule("b.{i}.w", "odd/w", layers=(3, 1)),
    ]
    tensors = {f"b.{i}.w": np.full(2, i, np.float32) for i in range(4)}
    params = round_trip(tensors, table)
    assert params["odd"]["w"][:, 0].tolist() == [3, 1]
    wanted = template(params) | {"even": {"w": jax.ShapeDtypeStruct((3, 2), np.float32)}}
    with pytest.raises(weights.WeightsError, match="stacks 3 layers, its rule names 2"):
        weights.import_weights(wanted, tensors, table)
    with pytest.raises(weights.WeightsError, match="its rule names 2 foreign layers"):
        weights.export_weights({"even": {"w": np.zeros((3, 2))}}, table)
    with pytest.raises(weights.WeightsError, match="each foreign layer once"):
        Rule("b.{i}.w", "w", layers=(1, 1))


def test_a_tree_without_template_needs_every_layer_and_every_rule() -> None:
    table = [*rules.dense("n.{i}", "layers"), *rules.norm("f", "final", optional=True)]
    tensors = {"n.0.weight": np.zeros((2, 3), np.float32), "n.0.bias": np.zeros(2, np.float32)}
    tensors |= {key.replace("0", "1"): value for key, value in tensors.items()}
    assert params_lib.flatten(weights.import_tree(tensors, table)).keys() == {
        "layers/kernel",
        "layers/bias",
    }
    without = {key: value for key, value in tensors.items() if key != "n.1.bias"}
    with pytest.raises(weights.WeightsError, match="missing: n.1.bias -> our layers/bias"):
        weights.import_tree(without, table)
    with pytest.raises(weights.WeightsError, match="under 'n.' are not numbered 0 to 1: 1 missing"):
        weights.import_tree({k.replace("1", "9" * 5000): v for k, v in tensors.items()}, table)
    with pytest.raises(weights.WeightsError, match=r"missing: n.\{i\}.weight -> our layers/kernel"):
        weights.import_tree({}, table)
    with pytest.raises(weights.WeightsError, match="unexpected: stray"):
        weights.import_tree(tensors | {"stray": np.zeros(1)}, table)


def test_a_tree_keeps_the_files_dtypes_or_takes_the_one_asked_for() -> None:
    tensors = {"a": np.ones(2, np.float16), "count": np.arange(3)}
    table = [Rule("a", "a"), Rule("count", "count")]
    found = weights.import_tree(tensors, table)
    assert [found[name].dtype for name in found] == [np.float16, np.int64]
    found = weights.import_tree(tensors, table, dtype=np.float32)
    assert [found[name].dtype for name in found] == [np.float32, np.int64]


def test_a_leaf_is_read_by_pieces_from_only_the_layers_asked_for() -> None:
    tensors = packed_tensors(3)
    opened = []

    def entry(name: str) -> weights.Entry:
        value = tensors[name]
        return weights.Entry(value.shape, value.dtype, lambda: opened.append(name) or value)

    file = weights.TensorFile("file", {name: entry(name) for name in tensors})
    whole = weights.import_tree(tensors, PACKED)
    source = weights.leaf_sources(whole, file, PACKED)["layers/attention/key/kernel"]
    piece = source.read((slice(1, 3), slice(0, 2), slice(None)))
    assert opened == ["b.1.in_proj_weight", "b.2.in_proj_weight"]
    wanted = whole["layers"]["attention"]["key"]["kernel"][1:3, :2]
    assert piece.tobytes() == wanted.tobytes()
