"""Converted checkpoints: complete or absent, exact both ways, refused when altered."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxmodels import weights
from jaxmodels.core import params as params_lib
from jaxmodels.weights import __main__ as command
from jaxmodels.weights import converted, orbax_arrays

WIDE, NARROW, LAYERS = 8, 4, 2


def electra_tensors(seed: int = 0, prefix: str = "", dtype=np.float32) -> dict[str, np.ndarray]:
    """A small ELECTRA as Hugging Face names it."""
    shapes = {f"embeddings.{n}_embeddings.weight": (rows, NARROW)
              for n, rows in [("word", 9), ("position", 7), ("token_type", 2)]}  # fmt: skip
    shapes |= {"embeddings.LayerNorm.weight": (NARROW,), "embeddings.LayerNorm.bias": (NARROW,)}
    modules = {"embeddings_project": (WIDE, NARROW)}
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}."
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            modules[f"{layer}attention.{name}"] = (WIDE, WIDE)
        modules |= {f"{layer}intermediate.dense": (6, WIDE), f"{layer}output.dense": (WIDE, 6)}
        for name in ("attention.output", "output"):
            shapes |= {f"{layer}{name}.LayerNorm.{k}": (WIDE,) for k in ("weight", "bias")}
    for name, shape in modules.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    rng = np.random.default_rng(seed)
    return {f"{prefix}{k}": rng.normal(size=shape).astype(dtype) for k, shape in shapes.items()}


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "electra"
    folder.mkdir()
    weights.save_safetensors(folder / "model.safetensors", electra_tensors())
    config = {"model_type": "electra", "num_attention_heads": 2, "layer_norm_eps": 1e-12}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = command.main(list(map(str, arguments)))
    output = capsys.readouterr()
    return status, output.out, output.err


def test_convert_and_back_gives_every_tensor_again(source, tmp_path, capsys) -> None:
    out, back = tmp_path / "out", tmp_path / "back.safetensors"
    status, said, _ = run(capsys, "convert", source, out)
    assert status == 0 and "family: electra" in said and "num_heads        2" in said
    assert run(capsys, "convert", out, back)[0] == 0
    found, wanted = weights.read(back), electra_tensors()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].tobytes() == value.tobytes(), name


def test_the_record_tells_family_settings_origin_and_leaves(source, tmp_path) -> None:
    made = weights.convert(source, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "model.json").read_text())
    assert record["family"] == "electra" and record["library"].startswith("jaxmodels ")
    assert record["settings"] == {
        "vocab_size": 9, "d_model": WIDE, "num_layers": LAYERS, "d_ff": 6, "max_positions": 7,
        "num_token_types": 2, "norm_order": "post", "norm_eps": 1e-12, "position_offset": 0,
        "pooler": False, "embedding_size": NARROW, "num_heads": 2,
    }  # fmt: skip
    assert made.settings == record["settings"]
    assert list(record["source"]["sha256"]) == ["model.safetensors"]
    assert record["leaves"]["embeddings_project/kernel"] == {"shape": [4, 8], "dtype": "float32"}
    assert made.leaves["encoder/layers/ffn/wi/kernel"].shape == (LAYERS, WIDE, 6)


def test_plain_orbax_and_a_template_read_the_same_tree(source, tmp_path) -> None:
    ocp = pytest.importorskip("orbax.checkpoint")
    made = weights.convert(source, tmp_path / "out")
    tensors = weights.read(source)
    wanted = weights.import_tree(tensors, weights.detect(tensors).rules(tensors))
    restored = ocp.StandardCheckpointer().restore(tmp_path / "out" / "params")
    jax.tree.map(np.testing.assert_array_equal, restored, wanted)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    template = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, ml_dtypes.bfloat16, sharding=sharding), wanted
    )
    placed = made.load(template)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(placed))
    half = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), wanted)
    jax.tree.map(np.testing.assert_array_equal, placed, half)


def test_a_dtype_and_a_part_are_kept_as_asked(tmp_path) -> None:
    tensors = electra_tensors(prefix="electra.")
    for name, shape in [("dense", (WIDE, WIDE)), ("dense_prediction", (1, WIDE))]:
        tensors[f"discriminator_predictions.{name}.weight"] = np.ones(shape, np.float32)
        tensors[f"discriminator_predictions.{name}.bias"] = np.ones(shape[:1], np.float32)
    weights.save_safetensors(tmp_path / "m.safetensors", tensors)
    whole = weights.convert(tmp_path / "m.safetensors", tmp_path / "whole")
    tops = {path.split("/")[0] for path in whole.leaves}
    assert whole.family == "electra" and tops == {"trunk", "discriminator"}
    half = weights.convert(
        tmp_path / "m.safetensors", tmp_path / "half", part="trunk", dtype=ml_dtypes.bfloat16
    )
    assert {path.split("/")[0] for path in half.leaves} == {
        "embeddings", "embeddings_project", "encoder",
    }  # fmt: skip
    assert {leaf.dtype for leaf in half.leaves.values()} == {np.dtype(ml_dtypes.bfloat16)}
    back = converted.export_converted(half)
    assert back.keys() == {name for name in tensors if name.startswith("electra.")}
    with pytest.raises(weights.WeightsError, match="'head' holds nothing; the tree has discrimin"):
        weights.convert(tmp_path / "m.safetensors", tmp_path / "x", part="head")


def test_an_existing_out_is_kept_unless_forced(source, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("")
    status, _, error = run(capsys, "convert", source, out)
    assert status == 2 and "exists" in error and "--force" in error and error.count("\n") == 1
    assert (out / "precious").exists()
    assert run(capsys, "convert", source, out, "--force")[0] == 0
    assert not (out / "precious").exists() and weights.is_converted(out)
    assert run(capsys, "convert", out, tmp_path / "b.safetensors")[0] == 0
    assert run(capsys, "convert", out, tmp_path / "b.safetensors")[0] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.safetensors", "electra", "out"]


@pytest.mark.parametrize("where", ["arrays", "manifest"])
def test_an_interrupted_conversion_leaves_nothing_that_looks_whole(
    source, tmp_path, monkeypatch, where
) -> None:
    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    weights.convert(source, out)
    before = (out / "manifest.json").read_text()
    target = orbax_arrays if where == "arrays" else converted.manifest
    monkeypatch.setattr(target, "write", interrupt)
    for place in (tmp_path / "new", out):
        with pytest.raises(KeyboardInterrupt):
            weights.convert(source, place, force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["electra", "out"]
    assert (out / "manifest.json").read_text() == before
    weights.open_converted(out).load()


def damaged(folder, name: str) -> None:
    path = folder / name
    if path.is_dir():
        path = max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["params", "model.json", "manifest.json"])
def test_an_altered_checkpoint_is_refused_whichever_file_it_is(source, tmp_path, name) -> None:
    out = tmp_path / "out"
    weights.convert(source, out)
    damaged(out, name)
    with pytest.raises(weights.WeightsError, match="differs from what was written|not a manifest"):
        weights.open_converted(out).load()


def test_a_checkpoint_without_manifest_and_a_later_format_are_refused(source, tmp_path) -> None:
    from etils import epath

    out = tmp_path / "out"
    weights.convert(source, out)
    record = json.loads((out / "model.json").read_text())
    (out / "manifest.json").unlink()
    with pytest.raises(weights.WeightsError, match="no whole converted checkpoint: manifest.json"):
        weights.open_converted(out)
    for change, message in [({"format": 2}, "format 2, not 1"), ({"leaves": 3}, "not as written")]:
        (out / "model.json").write_text(json.dumps(record | change))
        converted.manifest.write(epath.Path(out), {})
        with pytest.raises(weights.WeightsError, match=message):
            weights.open_converted(out)


def test_inspect_tells_family_settings_groups_and_totals(source, tmp_path, capsys) -> None:
    status, said, _ = run(capsys, "inspect", source)
    assert status == 0 and "family: electra\n  vocab_size       9\n" in said
    total = sum(value.size for value in electra_tensors().values())
    assert f"{len(electra_tensors())} tensors, {total:,} values, {4 * total:,} bytes\n" in said
    rows = [line for line in said.splitlines() if " values in " in line]
    assert [row.split()[0] for row in rows] == ["embeddings", "embeddings_project", "encoder"]
    assert len({row.index(" values") for row in rows}) == 1
    assert sum(int(row.split()[1].replace(",", "")) for row in rows) == total
    weights.convert(source, tmp_path / "out")
    status, said, _ = run(capsys, "inspect", tmp_path / "out")
    assert status == 0 and "encoder/layers/ffn/wi/kernel" in said and "family: electra" in said


def test_errors_are_one_line_and_their_status_tells_usage_from_files(tmp_path, capsys) -> None:
    tensors = electra_tensors()
    tensors = {
        key: value for key, value in tensors.items() if ".layer.1." not in key or "bias" in key
    }
    weights.save_safetensors(tmp_path / "m.safetensors", tensors)
    status, said, error = run(capsys, "convert", tmp_path / "m.safetensors", tmp_path / "out")
    assert (status, said) == (1, "") and error.count("\n") == 1
    assert "missing: encoder.layer.1.attention.self.query.weight" in error
    assert not (tmp_path / "out").exists()
    assert run(capsys, "inspect", tmp_path / "absent")[0] == 1
    status, _, error = run(capsys, "convert", tmp_path / "m.safetensors", tmp_path / "a" / "b")
    assert status == 2 and "there is no folder" in error
    weights.save_safetensors(tmp_path / "w.safetensors", {"conv1.weight": np.zeros(2, np.float32)})
    status, _, error = run(capsys, "convert", tmp_path / "w.safetensors", tmp_path / "out")
    assert status == 1 and "is of no known family (first keys: 'conv1.weight'). Known: " in error
    with pytest.raises(SystemExit) as stop:
        command.main(["convert", "a", "b", "--family", "nothing"])
    assert stop.value.code == 2


def test_a_converted_tree_imports_where_the_file_itself_does(source, tmp_path) -> None:
    made = weights.convert(source, tmp_path / "out")
    tensors = weights.read(source)
    direct = weights.import_tree(tensors, made.rules)
    loaded = params_lib.flatten(made.load())
    for path, leaf in params_lib.flatten(direct).items():
        np.testing.assert_array_equal(loaded[path], leaf, err_msg=path)
