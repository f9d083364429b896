"""Parity of whole VCC models: masked LM, task heads, dense baselines (other kinds roberta_*)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxmodels import weights
from jaxmodels.core import partitioning
from jaxmodels.core.embeddings import TokenEmbeddings, grow_position_table
from jaxmodels.trunks.bert import BertConfig, BertModel, MLMHead
from jaxmodels.vcc import losses
from jaxmodels.vcc.config import LAYOUTS
from jaxmodels.vcc.model import VccRoberta, VccWithHead

from .fixtures import Case
from .vcc_layers import bert_config, parameter_gradients, vcc_config

Computed = dict[str, Any]


def model_config(config: Mapping[str, Any], num_layers: int) -> BertConfig:
    """Our sizes from the official configuration of a model."""
    return dataclasses.replace(
        bert_config(config, num_layers),
        vocab_size=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        num_token_types=config["type_vocab_size"],
        position_offset=config["pad_token_id"] + 1,
    )


def vcc_model(case: Case, layout: str, head: str) -> VccWithHead:
    """The model of a file: its layers are local segments or compressed, by their official class."""
    config = case.meta["config"]
    kinds = tuple(
        "vcc" if name.endswith("VccEncoderLayer") else "local"
        for name in config["encoder_layer_types"]
    )
    return VccWithHead(
        trunk=model_config(config, len(kinds)),
        vcc=vcc_config(config, kinds, layout),
        head=head,
        num_classes=config["num_classes"],
    )


def model_batch(inputs: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """The arrays of a file under our names."""
    names = {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "importance_mask": "vip_mask",
        "token_type_ids": "token_type_ids",
        "position_ids": "position_ids",
        "masked_token_indices": "masked_positions",
        "mc_candidate_idxes": "candidate_positions",
    }
    return {ours: jnp.asarray(inputs[name]) for name, ours in names.items() if name in inputs}


def template(module: nn.Module, *args: Any) -> Any:
    """Shapes of a module's parameters, unboxed."""
    shapes = jax.eval_shape(lambda rng: module.init(rng, *args)["params"], jax.random.key(0))
    return partitioning.unbox(shapes)


def load(
    module: nn.Module, batch: dict[str, jax.Array], tensors: Mapping[str, np.ndarray]
) -> tuple[Any, weights.Rules]:
    """Parameters from official tensors, decided from their keys; and the rules used."""
    tree = template(module, batch)
    rules = weights.rules_for(tensors, tree)
    return weights.import_weights(tree, tensors, rules), rules


def apply_model(model: VccWithHead, params: Any, batch: Mapping[str, Any]) -> tuple[Any, Computed]:
    """What the head returns, and `embeddings`, `sequence_output`, `opened` of the trunk."""

    def kept(module: nn.Module, _: str) -> bool:
        return isinstance(module, VccRoberta | TokenEmbeddings)

    found, state = model.apply(
        {"params": params}, batch, capture_intermediates=kept, mutable=["intermediates"]
    )
    trunk = state["intermediates"]["trunk"]
    hidden, opened = trunk["__call__"][0]
    embeddings = trunk["embeddings"]["__call__"][0]
    return found, {"embeddings": embeddings, "sequence_output": hidden, "opened": opened}


def roberta_mlm(case: Case) -> list[Computed]:
    """Kind roberta_mlm, in both layouts of the compressed rows."""
    return [_mlm_in_layout(case, layout) for layout in LAYOUTS]


def _mlm_in_layout(case: Case, layout: str) -> Computed:
    model, batch = vcc_model(case, layout, "mlm_head"), model_batch(case.inputs)
    params, rules = load(model, batch, case.params)
    labels = jnp.take_along_axis(
        jnp.asarray(case.inputs["labels"]), batch["masked_positions"], axis=1
    )

    def run(params: Any) -> tuple[jax.Array, Any]:
        logits, trunk = apply_model(model, params, batch)
        pairs = losses.cross_entropy(logits, labels)
        return losses.mean(pairs["loss"]), (logits, pairs, trunk)

    step = jax.jit(jax.value_and_grad(run, has_aux=True))
    (loss, (logits, pairs, trunk)), gradients = step(params)
    opened = trunk.pop("opened")
    computed = {
        **trunk,
        "logits": logits,
        "loss": loss,
        "accuracy": losses.mean(pairs["accuracy"]),
        "count": pairs["loss"][1],
    }
    computed |= {
        f"fine_block_indices_vcc{index}": fine for index, fine in enumerate(opened["fine_blocks"])
    }
    outputs = {f"outputs/{name}": value for name, value in computed.items()}
    return outputs | parameter_gradients(gradients, rules)


def under(params: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The tensors whose key starts with `prefix`, which is cut off."""
    return {k.removeprefix(prefix): v for k, v in params.items() if k.startswith(prefix)}


def roberta_heads(case: Case) -> Computed:
    """Kind roberta_heads: the heads that the file holds, on one trunk."""
    batch, given = model_batch(case.inputs), case.inputs
    trunk = {k: v for k, v in case.params.items() if k.startswith("roberta.")}

    def run(head: str, own: dict[str, np.ndarray]) -> Any:
        model = vcc_model(case, "static", head)
        params, _ = load(model, batch, trunk | own)

        step = jax.jit(lambda params: apply_model(model, params, batch))
        found, of_trunk = step(params)
        computed.update(of_trunk)
        return found

    computed: Computed = {}
    if "classifier.weight" in case.params:
        scores = run("classifier", {"classifier.weight": case.params["classifier.weight"]})
        valid, answers = given["mc_candidate_mask"], given["mc_answer_index"]
        computed |= official_metrics("mc", losses.multiple_choice(scores, valid, answers))
    if own := under(case.params, "classification."):
        computed["cls_scores"] = run("classification", own)
        (labels,) = (v for k, v in given.items() if k.startswith("cls_label"))
        pairs = losses.cross_entropy(computed["cls_scores"], labels)
        computed |= official_metrics("cls", pairs)
    if own := under(case.params, "hotpotqa."):
        computed |= hotpotqa_outputs(run("hotpotqa", own), given)
    return {f"outputs/{name}": value for name, value in computed.items()}


def official_metrics(name: str, pairs: Mapping[str, losses.Pair]) -> Computed:
    """Mean loss, mean accuracy and count under their official names."""
    return {
        f"{name}_loss": losses.mean(pairs["loss"]),
        f"{name}_accu": losses.mean(pairs["accuracy"]),
        f"{name}_count": pairs["loss"][1],
    }


def hotpotqa_outputs(logits: Any, given: Mapping[str, np.ndarray]) -> Computed:
    """All numbers of the multi-task loss under their official names."""
    labels = {
        "paragraph_positions": given["hq_para_idxes"],
        "paragraph_labels": given["hq_para_labels"],
        "sentence_positions": given["hq_sent_idxes"],
        "sentence_labels": given["hq_sent_labels"],
        "answer_type": given["hq_cls_label"],
        "start": given["hq_ans_start_idxes"],
        "end": given["hq_ans_end_idxes"],
    }
    mask = given["attention_mask"]
    loss, pairs = losses.hotpotqa(logits, mask, labels)
    first, last = losses.best_span(*losses.span_logits(logits, mask))
    computed = {
        "hq_loss": loss,
        "hq_cls_logits": logits.answer_type,
        "hq_span_start_idx": first,
        "hq_span_end_idx": last,
    }
    official = {
        "paragraph": "para",
        "sentence": "sent",
        "answer_type": "cls",
        "start": "ans_start",
        "end": "ans_end",
    }
    for ours, theirs in official.items():
        part = {kind: pairs[f"{ours}_{kind}"] for kind in ("loss", "accuracy")}
        computed |= official_metrics(f"hq_{theirs}", part)
    for ours in ("paragraph", "sentence"):
        states = getattr(logits, ours)
        index = labels[f"{ours}_positions"][..., None]
        predicted = jnp.take_along_axis(states, index, axis=1).argmax(-1)
        score = losses.binary_f1(predicted, labels[f"{ours}_labels"])
        computed[f"hq_{official[ours]}_f1"] = score
    return computed


def roberta_dense_baselines(case: Case) -> Computed:
    """Kind roberta_dense_baselines: dense models of both norms, and a grown position table."""
    config, batch = case.meta["config"], model_batch(case.inputs)
    names = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
    inputs = [batch[name] for name in names]
    computed, trees = {}, {}
    for norm in sorted({key.partition(".")[0] for key in case.params}):
        sizes = model_config(config, config["num_hidden_layers"])
        sizes = dataclasses.replace(sizes, norm_order=norm.removesuffix("norm"))
        trunk, head = BertModel(sizes), MLMHead(sizes.vocab_size, sizes.norm_eps)
        states = jnp.zeros((1, 1, sizes.d_model))
        tree = {"trunk": template(trunk, *inputs), "mlm_head": template(head, states)}
        tensors = under(case.params, f"{norm}.")
        params = weights.import_weights(tree, tensors, weights.rules_for(tensors, tree))
        hidden = jax.jit(trunk.apply)({"params": params["trunk"]}, *inputs)
        computed[f"outputs/{norm}_sequence_output"] = hidden
        computed[f"outputs/{norm}_logits"] = head.apply({"params": params["mlm_head"]}, hidden)
        trees[norm] = params
    wanted = case.expected.get("outputs/resized_position_embeddings")
    if wanted is not None:
        table = trees["postnorm"]["trunk"]["embeddings"]["position"]["embedding"]
        grown = grow_position_table(table, len(wanted), config["pad_token_id"] + 1)
        computed["outputs/resized_position_embeddings"] = grown
    return computed
