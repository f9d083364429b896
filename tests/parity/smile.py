"""Parity of SMILE: which function computes which kind, and how its arrays are compared."""

from . import smile_layers, smile_tables

ADAPTERS = {
    "cost_model": smile_tables.cost_model_rows,
    "drop_rate": smile_tables.drops,
    "moe_layer": smile_layers.moe_layer,
    "moe_sgd": smile_layers.moe_sgd,
    "presets": smile_tables.presets,
    "router_only": smile_layers.router_only,
}
EXPECTED = {
    "cost_model": smile_tables.expected_costs,
    "drop_rate": smile_tables.expected_drops,
    "presets": smile_tables.expected_counts,
}
RULES: dict[str, str] = {}
