"""The short way to a published model: family, settings and parameters of a path."""

import json

import jax
import numpy as np
import pytest

from jaxmodels import weights
from jaxmodels.trunks import t5
from jaxmodels.weights.t5 import t5_rules
from jaxmodels.weights.tensor_file import as_tensor_file

CONFIG = t5.T5Config(
    vocab_size=30, d_model=8, num_layers=1, num_decoder_layers=1, num_heads=2, head_dim=4, d_ff=12
)


@pytest.fixture
def folder(tmp_path):
    model = t5.T5(CONFIG)
    params = model.init(jax.random.key(0), np.ones((1, 2), np.int32))["params"]
    params = jax.tree.map(np.asarray, weights_of(params))
    tensors = weights.export_weights(params, t5_rules(gated=False, tied_head=True))
    halves = {name: value.astype(np.float16) for name, value in tensors.items()}
    weights.save_safetensors(tmp_path / "model.safetensors", halves)
    (tmp_path / "config.json").write_text(json.dumps({"dropout_rate": 0.25}))
    return tmp_path, as_tensor_file(halves)


def weights_of(boxed):
    return jax.tree.map(lambda x: x.unbox(), boxed, is_leaf=lambda x: hasattr(x, "unbox"))


def test_a_folder_becomes_settings_and_float32_parameters(folder):
    path, file = folder
    loaded = weights.load(path)
    assert loaded.family == "t5" and loaded.settings["dropout_rate"] == 0.25
    assert t5.T5Config(**loaded.settings) == t5.T5Config(
        **{**{f: getattr(CONFIG, f) for f in CONFIG.__dataclass_fields__}, "dropout_rate": 0.25}
    )
    found = loaded.params["encoder"]["layers"]["ffn"]["wi"]["kernel"]
    assert isinstance(found, jax.Array) and found.dtype == np.float32
    source = file["encoder.block.0.layer.1.DenseReluDense.wi.weight"]
    np.testing.assert_array_equal(found[0], source.T.astype(np.float32))


def test_a_family_that_the_file_is_not_of_is_refused(folder):
    with pytest.raises(weights.WeightsError, match="family 'bert5' is not known. Known: .*t5"):
        weights.load(folder[0], family="bert5")
    with pytest.raises(weights.WeightsError, match="0 trunks of the BERT family"):
        weights.load(folder[0], family="bert")
