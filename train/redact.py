"""Takes secrets out of text before it is printed, logged, saved or sent.

Three kinds are known: what looks like a secret (signed URLs, bearer tokens, the key formats of
the large services), what is named like one (`hf_token=...`), and the values of environment
variables named like one, wherever they turn up.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
_NAME = (
    r"(?:token|secret|password|passwd|credential|signature|authorization"
    r"|(?:api|access|private|secret)[_-]?key(?:[_-]?id)?)"
)
_SECRET_NAME = re.compile(rf"{_NAME}$", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(rf"{_NAME}s?(_|$)", re.IGNORECASE)
_SHORTEST = 8  # characters of a variable's value worth hiding
_PATTERNS = (
    (re.compile(r"(\w://)[^/\s@'\"]+@"), rf"\1{HIDDEN}@"),  # https://user:password@host
    (re.compile(r"(https?://[^\s'\"<>?#]+)[?#][^\s'\"<>]+"), rf"\1?{HIDDEN}"),  # signed URLs
    (re.compile(rf"([\w.-]*{_NAME}=)['\"]?[^\s'\",;&]+['\"]?", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(rf"(['\"][\w.-]*{_NAME}['\"]:\s*['\"])[^'\"]+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]{8,}"), rf"\1 {HIDDEN}"),
    (
        re.compile(
            r"\b(hf_|gh[pousr]_|github_pat_|glpat-|sk-|xox[abpr]-|AKIA|ASIA|AIza|ya29\.)[\w.-]{12,}"
        ),
        rf"\1{HIDDEN}",
    ),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"), HIDDEN),  # JSON web tokens
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*-----|\Z)", re.S), HIDDEN),
)


def redact(text: str) -> str:
    """Returns `text` with what is, or is named like, a secret replaced by `***`."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _SECRET_VARIABLE.search(name) and not _is_path(value):
            text = text.replace(value, HIDDEN)
    for pattern, shown in _PATTERNS:
        text = pattern.sub(shown, text)
    return text


def redact_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config (nested or flat) whose strings, and fields named like secrets, are redacted.

    Numbers, booleans and None stay as they are: a field `model.special_token` may be one.
    """
    return {name: _redact_value(name, value) for name, value in values.items()}


def _redact_value(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return redact_values(value)
    if isinstance(value, list | tuple):
        return type(value)(_redact_value(name, item) for item in value)
    if not isinstance(value, str):
        return value
    return HIDDEN if value and _SECRET_NAME.search(name) else redact(value)


def _is_path(value: str) -> bool:
    """A variable such as GOOGLE_APPLICATION_CREDENTIALS names a file, which is no secret."""
    return os.path.isabs(value) and os.path.exists(value)
