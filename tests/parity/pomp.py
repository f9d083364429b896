"""Parity of POMP: which function computes which kind, and how its arrays are compared."""

from . import pomp_data, pomp_towers

ADAPTERS = {
    "clip_bpe_merges": pomp_data.clip_bpe_merges,
    "clip_from_state_dict": pomp_towers.clip_from_state_dict,
    "coco_pomp_class_vectors": pomp_data.coco_pomp_class_vectors,
    "data_lists": pomp_data.data_lists,
    "image_tower_rn": pomp_towers.image_tower_rn,
    "image_tower_vit": pomp_towers.image_tower_vit,
    "in21k_class_names": pomp_data.in21k_class_names,
    "preprocess": pomp_data.preprocess,
    "text_tower": pomp_towers.text_tower,
    "tokenizer_cases": pomp_data.tokenizer_cases,
    "zeroshot_ensemble": pomp_towers.zeroshot_ensemble,
}
# Kinds whose references are inside a json document.
EXPECTED = {"tokenizer_cases": pomp_data.expected_tokenizer_cases}
RULES: dict[str, str] = {}
