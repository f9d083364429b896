"""The code in the documentation runs as it stands, and prints what stands beside it."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

from jaxmodels import weights
from jaxmodels.weights import __main__ as weights_command

ROOT = pathlib.Path(__file__).parents[2]
PAGES = ("docs/adding_a_method.md", "docs/moe.md")
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_PRINTS = re.compile(r"^print\(.*\)  # (.*)$", re.MULTILINE)
_COMMAND = re.compile(r"^python -m jaxmodels\.weights (.*)$", re.MULTILINE)
PUBLISHED = "flan-t5-base"  # the folder that README names


def published(folder: pathlib.Path) -> None:
    """Writes a model folder as Hugging Face's, FLAN-T5's layout and vocabulary, in little."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=32128,
        d_model=8,
        d_kv=4,
        d_ff=16,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        eos_token_id=1,
        pad_token_id=0,
        decoder_start_token_id=0,
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)


def section(title: str) -> str:
    """The part of README under one heading."""
    return (ROOT / "README.md").read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs_and_prints_what_it_says(page: str, tmp_path) -> None:
    run((ROOT / page).read_text(), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("title", ["Use one module", "Published weights"])
def test_the_code_of_the_readme_runs_and_prints_what_it_says(title, tmp_path) -> None:
    text = section(title)
    if PUBLISHED in text:
        published(tmp_path / PUBLISHED)
    run(text, tmp_path)


def test_the_readmes_commands_convert_published_weights_and_back(
    tmp_path, monkeypatch, capsys
) -> None:
    published(tmp_path / PUBLISHED)
    monkeypatch.chdir(tmp_path)
    lines = _COMMAND.findall(section("Published weights"))
    # Only the file's place is not README's.
    commands = [shlex.split(line.replace("/tmp/", ""), comments=True) for line in lines]
    assert [command[0] for command in commands] == ["inspect", "convert", "convert"]
    for command in commands:
        assert weights_command.main(command) == 0, capsys.readouterr().err
        if command[0] == "inspect":
            said = capsys.readouterr().out
    original, back = weights.read(PUBLISHED), weights.read(commands[-1][-1])
    assert "family: t5" in said and "num_heads" in said and all(name in said for name in original)
    assert back.keys() == original.keys()
    for name, value in original.items():
        assert back[name].dtype == value.dtype
        np.testing.assert_array_equal(back[name], value)


def run(text: str, folder: pathlib.Path) -> None:
    """Runs all Python of a Markdown text, in order, and compares what is printed.

    In a process of its own, as a reader would; the library is this one.
    """
    blocks = _BLOCK.findall(text)
    assert len(blocks) == text.count("```python") > 0
    (folder / "page.py").write_text("\n".join(blocks))
    done = subprocess.run(
        [sys.executable, folder / "page.py"], cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    wanted = [line.split(":")[0] for line in _PRINTS.findall("\n".join(blocks))]
    assert done.stdout.splitlines() == wanted
