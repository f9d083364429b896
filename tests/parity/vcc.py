"""Parity of VCC: which function computes which kind, and how its arrays are compared."""

from . import vcc_data, vcc_layers, vcc_models, vcc_t5

ADAPTERS = {
    "baseline_attentions": vcc_data.baseline_attentions,
    "compress": vcc_layers.compress,
    "data_cluster_permuted_mlm": vcc_data.cluster_permuted_mlm,
    "data_span_corruption": vcc_data.span_corruption,
    "roberta_dense_baselines": vcc_models.roberta_dense_baselines,
    "roberta_heads": vcc_models.roberta_heads,
    "roberta_layers": vcc_layers.roberta_layers,
    "roberta_mlm": vcc_models.roberta_mlm,
    "t5_layers": vcc_t5.t5_layers,
    "t5_relative_bias": vcc_t5.t5_relative_bias,
    "t5_seq2seq": vcc_t5.t5_seq2seq,
}
RULES = {
    # The order inside a selection carries no meaning.
    r"(fine|coarse)_block_indices": "set",
    # A key bias shifts all scores of a query equally: its true gradient is zero.
    r"^grads/.*attention\.(self\.)?key\.bias$": "near_zero",
}
