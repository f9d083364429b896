"""Parity of the pretrained encoders that LeMDA stands on."""

from typing import Any

import jax
import numpy as np

from jaxmodels import weights
from jaxmodels.core import partitioning
from jaxmodels.trunks.bert import BertConfig, BertModel

from .fixtures import Case

HIDDEN = "outputs/last_hidden_state"


def valid_tokens(case: Case) -> np.ndarray:
    """[batch, length] bool: positions before the valid length."""
    length = case.inputs["token_ids"].shape[1]
    return np.arange(length)[None, :] < case.inputs["valid_length"][:, None]


def expected_text_encoder_electra(case: Case) -> dict[str, np.ndarray]:
    """All arrays; of the hidden states those of valid tokens, as the file says."""
    return case.expected | {HIDDEN: case.expected[HIDDEN][valid_tokens(case)]}


def electra_config(case: Case) -> BertConfig:
    """Our sizes from those of the file."""
    sizes = case.meta["config"]
    return BertConfig(
        vocab_size=sizes["vocab_size"],
        d_model=sizes["hidden_size"],
        num_layers=sizes["num_hidden_layers"],
        num_heads=sizes["num_attention_heads"],
        d_ff=sizes["intermediate_size"],
        max_positions=sizes["max_position_embeddings"],
        num_token_types=sizes["type_vocab_size"],
        norm_eps=case.meta["layer_norm_eps"],
        position_offset=0,
        embedding_size=sizes["embedding_size"],
    )


def text_encoder_electra(case: Case) -> dict[str, Any]:
    """Kind text_encoder_electra: the first token's hidden state, and a linear head on it."""
    model, ids = BertModel(electra_config(case)), case.inputs["token_ids"]
    valid = valid_tokens(case)
    shapes = jax.eval_shape(lambda rng: model.init(rng, ids)["params"], jax.random.key(0))
    template = partitioning.unbox(shapes)
    trunk = {key: value for key, value in case.params.items() if key.startswith("model.")}
    params = weights.import_weights(template, trunk, weights.rules_for(trunk, template))
    hidden = model.apply({"params": params}, ids, valid, case.inputs["segment_ids"])
    features = np.asarray(hidden[:, 0])
    logits = features @ case.params["head.weight"].T + case.params["head.bias"]
    return {
        "outputs/features": features,
        "outputs/logits": logits,
        HIDDEN: np.asarray(hidden)[valid],
    }
