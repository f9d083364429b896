"""Published weights start a run: placed whole, cast, the rest fresh; what does not fit is named."""

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxmodels import weights
from jaxmodels.core import params as params_lib
from jaxmodels.core import partitioning
from jaxmodels.weights import families
from tests.train import checkpoint_cases as cases
from tests.train import runs, toy_config, toy_weights
from train import init_from
from train.checkpoint import Checkpoints
from train.errors import CheckpointError, UsageError
from train.loop import train
from train.trained import open_run

WIDTH = toy_weights.WIDTH
published = toy_weights.publish


@pytest.fixture(autouse=True)
def toy_family(monkeypatch):
    monkeypatch.setattr(families, "known_families", lambda: {"toy": toy_weights.FAMILY})


def short(**settings):
    return runs.config(
        total_steps=1, optimizer__warmup_steps=0, optimizer__learning_rate=1e-12, **settings
    )


def abstract(width: int = WIDTH, root: str = "", sharding=None):
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = {"embedding/table": (64, width), "hidden/kernel": (width, width)}
    shapes |= {"hidden/bias": (width,)}
    shapes = {root + name: shape for name, shape in shapes.items()} | {"out/kernel": (width, 4)}
    return params_lib.unflatten(
        {
            name: jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding)
            for name, shape in shapes.items()
        }
    )


@pytest.mark.parametrize("kind", ["file", "converted", "bfloat16"])
def test_a_run_starts_from_published_weights_and_fresh_heads(tmp_path, capsys, kind) -> None:
    place = tmp_path / "model.safetensors"
    tensors = published(place, ml_dtypes.bfloat16 if kind == "bfloat16" else np.float32)
    if kind != "file":
        place = weights.convert(place, tmp_path / "converted").path
    config = short(init_from=str(place))
    train(config, tmp_path / "run", toy_config.FIELDS)
    said = capsys.readouterr().out
    assert "(toy): 3 parameters at the root; 2 stay fresh: out/bias, out/kernel" in said
    params = open_run(tmp_path / "run").params
    assert params["embedding"]["table"].dtype == np.float32
    near = dict(atol=1e-9, rtol=1e-6)
    np.testing.assert_allclose(
        params["hidden"]["kernel"], tensors["fc.weight"].astype(np.float32).T, **near
    )
    np.testing.assert_allclose(
        params["embedding"]["table"], tensors["wte.weight"].astype(np.float32), **near
    )
    # Fresh leaves are those of the seed, whatever the file holds.
    train(short(), tmp_path / "fresh", toy_config.FIELDS)
    fresh = open_run(tmp_path / "fresh").params
    np.testing.assert_allclose(params["out"]["kernel"], fresh["out"]["kernel"], **near)


def test_frozen_parameters_take_published_weights_too(tmp_path) -> None:
    tensors = published(tmp_path / "m.safetensors")
    config = short(init_from=str(tmp_path / "m.safetensors"), model__frozen="embedding")
    train(config, tmp_path / "run", toy_config.FIELDS)
    params = open_run(tmp_path / "run").params
    np.testing.assert_array_equal(params["embedding"]["table"], tensors["wte.weight"])


def test_a_trunk_is_found_under_trunk(tmp_path) -> None:
    tensors = published(tmp_path / "m.safetensors")
    placed, line, *_ = init_from.load(tmp_path / "m.safetensors", abstract(root="trunk/"))
    assert sorted(placed) == ["trunk/embedding/table", "trunk/hidden/bias", "trunk/hidden/kernel"]
    assert "3 parameters under trunk; 1 stay fresh: out/kernel" in line
    np.testing.assert_array_equal(placed["trunk/hidden/bias"], tensors["fc.bias"])


def test_leaves_are_placed_as_the_model_is_sharded(tmp_path) -> None:
    mesh = jax.make_mesh((1,), ("device",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("device"))
    published(tmp_path / "m.safetensors")
    converted = weights.convert(tmp_path / "m.safetensors", tmp_path / "c").path
    for place in (tmp_path / "m.safetensors", converted):
        placed, *_ = init_from.load(place, abstract(sharding=sharding))
        assert all(leaf.sharding == sharding for leaf in placed.values())


def test_other_weights_have_another_digest_and_a_copy_has_the_same(tmp_path) -> None:
    tensors = published(tmp_path / "m.safetensors")
    (tmp_path / "copy").mkdir()
    published(tmp_path / "copy" / "m.safetensors")
    (tmp_path / "other").mkdir()
    tensors["fc.bias"][-1] += 1
    weights.save_safetensors(tmp_path / "other" / "m.safetensors", tensors)
    files = [tmp_path / folder / "m.safetensors" for folder in (".", "copy", "other")]
    for places in (files, [weights.convert(f, f.parent / "converted").path for f in files]):
        same, copied, other = (init_from.load(place, abstract()).digest for place in places)
        assert same == copied != other


def test_leaves_without_a_place_are_refused_and_the_trunk_alone_is_advised(tmp_path) -> None:
    published(tmp_path / "m.safetensors", head=True)
    with pytest.raises(UsageError) as error:
        init_from.load(tmp_path / "m.safetensors", abstract(root="trunk/"))
    text = str(error.value)
    assert "2 of 5 leaves have no place in the model: head/bias, head/kernel" in text
    assert "--part trunk" in text and "\n" not in text
    made = weights.convert(tmp_path / "m.safetensors", tmp_path / "trunk", part="trunk")
    assert len(init_from.load(made.path, abstract()).placed) == 3


def test_another_size_is_refused_by_name_before_anything_is_read(tmp_path, monkeypatch) -> None:
    published(tmp_path / "m.safetensors", width=32)
    converted = weights.convert(tmp_path / "m.safetensors", tmp_path / "c").path
    monkeypatch.setattr(weights, "load_sharded", None)
    monkeypatch.setattr(weights.Converted, "load", None)
    for place in (tmp_path / "m.safetensors", converted):
        with pytest.raises(UsageError, match=f"init_from={place}: weights of another size") as e:
            init_from.load(place, abstract())
        assert "hidden/kernel is [32, 32], wanted [64, 64]" in str(e.value)


@pytest.mark.parametrize(
    ("fill", "kind"), [("repeat", "file"), ("fresh", "converted"), ("new", "file")]
)
def test_a_table_of_fewer_rows_is_filled_up_as_asked(tmp_path, kind, fill) -> None:
    place = tmp_path / "model.safetensors"
    tensors = published(place, rows=30)
    if kind == "converted":
        place = weights.convert(place, tmp_path / "converted").path
    found = init_from.load(place, abstract(), (f"table={fill}",))
    assert f"rows: embedding/table 30 -> 64 ({fill}); 1 stay fresh" in found.line
    model = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 5.0), abstract())
    rows, own = tensors["wte.weight"], np.full((64, WIDTH), 5, np.float32)
    wanted = {
        # 28 rows from the third on, again and again: RoBERTa's first two stand for no position
        "repeat": np.concatenate([rows, rows[2:], rows[2:8]]),
        "fresh": np.concatenate([rows, own[30:]]),
        "new": own,
    }[fill]
    np.testing.assert_array_equal(init_from.filled(model, found)["embedding"]["table"], wanted)


def test_a_run_fills_up_a_table(tmp_path, capsys) -> None:
    tensors = published(tmp_path / "m.safetensors", rows=30)
    config = short(init_from=str(tmp_path / "m.safetensors"), init_rows=("table=repeat",))
    train(config, tmp_path / "run", toy_config.FIELDS)
    assert "rows: embedding/table 30 -> 64 (repeat); 2 stay fresh" in capsys.readouterr().out
    table = open_run(tmp_path / "run").params["embedding"]["table"]
    np.testing.assert_allclose(table[:30], tensors["wte.weight"], atol=1e-9, rtol=1e-6)
    np.testing.assert_allclose(table[30:58], tensors["wte.weight"][2:], atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("place", [".", "checkpoints/2"])
def test_a_run_with_other_heads_gives_its_trunk(tmp_path, place) -> None:
    trunk = {"embedding": {"table": np.full((30, WIDTH), 2.0, np.float32)}}
    head = {"bias": np.ones(7, np.float32)}
    frozen = {"trunk": {"hidden": {"kernel": np.eye(WIDTH, dtype=np.float32)}}}
    trainable = jax.tree.map(jnp.asarray, {"trunk": trunk, "old_head": head})
    with Checkpoints(tmp_path) as saved:
        saved.save(2, cases.state(2, trainable=trainable, frozen=frozen), {})
    model = abstract(root="trunk/")
    found = init_from.load(tmp_path / place, model, ("table=repeat",))
    assert "(step 2 of a run): 1 parameters at the root; rows: trunk/embedding" in found.line
    assert "2 stay fresh: out/kernel, trunk/hidden/bias; 1 are left out: old_head" in found.line
    own = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), model)
    params = init_from.filled(own, found)
    np.testing.assert_array_equal(params["trunk"]["embedding"]["table"], 2.0)
    np.testing.assert_array_equal(params["trunk"]["hidden"]["kernel"], np.eye(WIDTH))
    np.testing.assert_array_equal(params["out"]["kernel"], 0.0)


def test_a_run_gives_all_it_has_where_all_has_a_place(tmp_path) -> None:
    train(short(), tmp_path / "first", toy_config.FIELDS)
    train(short(init_from=str(tmp_path / "first")), tmp_path / "second", toy_config.FIELDS)
    chex.assert_trees_all_close(
        open_run(tmp_path / "second").params, open_run(tmp_path / "first").params, atol=1e-9
    )


def test_a_damaged_run_is_named(tmp_path) -> None:
    train(short(), tmp_path / "first", toy_config.FIELDS)
    for file in (tmp_path / "first" / "checkpoints" / "1" / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="checkpoint 1 .* is damaged"):
        train(short(init_from=str(tmp_path / "first")), tmp_path / "second", toy_config.FIELDS)


def test_a_split_table_is_filled_up_where_it_lies(tmp_path) -> None:
    tensors = published(tmp_path / "m.safetensors", rows=30)
    mesh = partitioning.make_mesh(1, 1, jax.devices()[:1])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("device"))
    model = abstract(sharding=sharding)
    found = init_from.load(tmp_path / "m.safetensors", model, ("embedding/table=fresh",))
    own = jax.tree.map(lambda leaf: jax.device_put(np.ones(leaf.shape), leaf.sharding), model)
    table = init_from.filled(own, found)["embedding"]["table"]
    assert table.sharding == sharding
    np.testing.assert_array_equal(table[:30], tensors["wte.weight"])
    np.testing.assert_array_equal(table[30:], 1)


@pytest.mark.parametrize(
    ("rows", "given", "said"),
    [
        (30, (), "--config.init_rows=embedding/table=repeat|fresh|new fills up a table"),
        (30, ("tables=new",), "'tables' is no leaf of it; the file has embedding/table, hidden"),
        (30, ("table=mean",), "'table=mean': accepted is LEAF=repeat|fresh|new"),
        (65, ("table=fresh",), "only a table with fewer rows can be filled up"),
        (64, ("kernel=fresh", "bias=fresh", "table=no"), "accepted is LEAF="),
    ],
)
def test_rows_that_cannot_be_filled_up_are_told(tmp_path, rows, given, said) -> None:
    published(tmp_path / "m.safetensors", rows=rows)
    with pytest.raises(UsageError) as error:
        init_from.load(tmp_path / "m.safetensors", abstract(), given)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_weights_file_is_refused_before_compiling(tmp_path) -> None:
    weights.save_safetensors(tmp_path / "other.safetensors", {"x": np.zeros(3, np.float32)})
    cut = tmp_path / "cut"
    published(tmp_path / "m.safetensors")
    weights.convert(tmp_path / "m.safetensors", cut)
    (cut / "manifest.json").unlink()
    altered = tmp_path / "altered"
    weights.convert(tmp_path / "m.safetensors", altered)
    largest = max((p for p in altered.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    for place, said in [
        (tmp_path / "absent", "no such file"),
        (tmp_path / "other.safetensors", "is of no known family"),
        (cut, "no whole converted checkpoint: manifest.json is missing"),
        (altered, "is damaged: .* differs from what was written"),
    ]:
        with pytest.raises(UsageError, match=said) as error:
            train(short(init_from=str(place)), tmp_path / "run", toy_config.FIELDS)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "run" / "config.json").exists()


def test_two_beginnings_at_once_are_refused(tmp_path) -> None:
    config = short(init_from="a", warm_start="b")
    with pytest.raises(UsageError, match="init_from and warm_start both"):
        train(config, tmp_path / "run", toy_config.FIELDS)
