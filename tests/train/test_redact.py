"""Secrets are taken out of all that is printed or sent; everything else is left as it is."""

import pytest

from train.redact import redact, redact_values

SIGNATURE = "9f8b7c6d5e4f9f8b7c6d5e4f"


@pytest.mark.parametrize(
    "text",
    [
        f"https://storage.googleapis.com/b/o?X-Goog-Algorithm=a;b&X-Goog-Signature={SIGNATURE}",
        f"GET https://host/file?sig={SIGNATURE} failed",
        f"https://user:{SIGNATURE}@host/path",
        f"hf_token={SIGNATURE}",
        f"WANDB_API_KEY={SIGNATURE} python",
        f"password='{SIGNATURE}'",
        f'{{"access_token": "{SIGNATURE}"}}',
        f"Authorization: Bearer {SIGNATURE}",
        f"found hf_{SIGNATURE} in the file",
        f"ya29.{SIGNATURE}",
        f"AKIA{SIGNATURE.upper()}",
        f"eyJhbGciOiJIUzI1NiJ9.{SIGNATURE}.{SIGNATURE}",
        f"-----BEGIN RSA PRIVATE KEY-----\n{SIGNATURE}\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_a_secret_is_hidden(text):
    shown = redact(text)
    assert SIGNATURE.lower() not in shown.lower() and "***" in shown


@pytest.mark.parametrize(
    "text",
    [
        "step 10/100 | loss 2.5 | 812.4 examples/s | 16,640 tokens/s | eta 2s",
        "model.num_token_types=128: accepted is int, > 0",
        "data.tokenizer=/data/tokenizer.json",
        "https://example.org/a/b.txt is not there",
        "gs://bucket/data-?.txt",
        "unknown token: [UNK] at 5",
        "step=7, sha256 2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",
    ],
)
def test_what_is_no_secret_stays(text):
    assert redact(text) == text


def test_values_of_secret_variables_are_hidden_wherever_they_turn_up(monkeypatch, tmp_path):
    key = tmp_path / "key.json"
    key.write_text("")
    monkeypatch.setenv("MY_API_KEY", "correct horse battery")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(key))
    monkeypatch.setenv("SHORT_TOKEN", "no")
    text = f"no: correct horse battery, {key}"
    assert redact(text) == f"no: ***, {key}"


def test_values_of_a_config_keep_their_types():
    values = {
        "data": {"files": (f"https://h/f?sig={SIGNATURE}",), "hf_token": "abc", "num": 3},
        "model.special_token": 7,
        "x": None,
    }
    assert redact_values(values) == {
        "data": {"files": ("https://h/f?***",), "hf_token": "***", "num": 3},
        "model.special_token": 7,
        "x": None,
    }
