"""Parity of LeMDA: which function computes which kind, and how its arrays are compared."""

from . import lemda_encoders

ADAPTERS = {"text_encoder_electra": lemda_encoders.text_encoder_electra}
# Kinds whose references are not all of the file's arrays.
EXPECTED = {"text_encoder_electra": lemda_encoders.expected_text_encoder_electra}
RULES: dict[str, str] = {}
