"""Which blocks the trained model opened for one held-out document, with its text, as HTML."""

import html
from pathlib import Path
from typing import Any

import jax
import numpy as np

SHOWN = 5  # opened blocks whose text is shown, a layer; the answer's block besides


def opened_blocks(workdir: Path, index: int = 0) -> dict[str, Any]:
    """Runs the trained model on one held-out document.

    Args:
      workdir: a VCC run of the demo.
      index: of the document.

    Returns:
      question, answer and prediction as words; `layers`: opened block indices a VCC layer, best
      first; `blocks`: the text of every block; `answer_block`; `length` in tokens.
    """
    from jaxmodels.data import tokenizer
    from train.trained import open_run

    run = open_run(workdir)
    task = run.task
    source = task.source(
        "validation",
        run.config.data.length,
        run.config.data.fact_groups,
        run.config.data.validation_documents,
    )
    batch = {name: np.asarray(value)[None] for name, value in source[index].items()}
    batch = {name: value.astype(np.int32) for name, value in batch.items()}
    with jax.set_mesh(run.mesh):
        logits, opened = jax.device_get(jax.jit(task.logits)(run.params, batch))
    bpe = tokenizer.load(task.vocabulary.tokenizer_path)
    ids, p, b = batch["input_ids"][0], task.vcc.num_vip, task.vcc.block_size
    order = opened["order"][0][p:].reshape(-1, b)
    block_of = {int(token): j for j, block in enumerate(order) for token in block}
    words = [bpe.decode([i]).strip() for i in task.vocabulary.value_ids]
    return {
        "question": bpe.decode(ids[1:8].tolist()).strip(),
        "answer": words[int(batch["answers"][0, 0])],
        "prediction": words[int(logits[0, 0].argmax())],
        "layers": opened["fine_blocks"][:, 0].tolist(),
        "blocks": [" ".join(bpe.decode(ids[block].tolist()).split()) for block in order],
        "answer_block": block_of[int(batch["answer_positions"][0, 0])],
        "length": len(ids),
    }


def to_html(found: dict[str, Any]) -> str:
    """Returns a section: the question, a map of the document's blocks, and the opened text."""
    right = "right" if found["answer"] == found["prediction"] else "wrong"
    parts = [
        f"<p><b>Question (the VIP tokens):</b> {html.escape(found['question'])} &nbsp; "
        f"<b>answer</b> {html.escape(found['answer'])}, <b>model says</b> "
        f"{html.escape(found['prediction'])} ({right}).</p>",
        f"<p>Each cell is a block of the {found['length']:,}-token document, in text order. "
        "Blue: opened by the layer. Orange frame: the block that holds the answer.</p>",
    ]
    for layer, opened in enumerate(found["layers"], start=1):
        parts.append(f"<h3>VCC layer {layer}: {len(opened)} of {len(found['blocks'])} blocks</h3>")
        parts.append(_map(found, set(opened)))
        parts.append("<ol>")
        later = [block for block in opened[SHOWN:] if block == found["answer_block"]]
        for block in opened[:SHOWN] + later:
            text = html.escape(found["blocks"][block])
            mark = ' class="answer"' if block == found["answer_block"] else ""
            rank = opened.index(block) + 1
            parts.append(f'<li value="{rank}"><span{mark}>block {block}: {text}</span></li>')
        parts.append("</ol>")
    return "\n".join(parts)


def _map(found: dict[str, Any], opened: set[int]) -> str:
    cells = []
    for block, text in enumerate(found["blocks"]):
        kinds = ["cell"]
        kinds += ["open"] if block in opened else []
        kinds += ["holds"] if block == found["answer_block"] else []
        title = html.escape(f"block {block}: {text}", quote=True)
        cells.append(f'<i class="{" ".join(kinds)}" title="{title}"></i>')
    return f'<div class="map">{"".join(cells)}</div>'
