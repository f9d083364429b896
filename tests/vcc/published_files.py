"""Tiny copies of the published files of every fine-tuning data set."""

import json
import pathlib
import zipfile
from typing import Any

SCROLLS = {
    "quality": (
        "Who ran?\n\n (A) a dog\n (B) a cat\n (C) a cow\n (D) nobody\n\n\nA dog ran. (D) no.",
        "a dog",
    ),
    "qasper": ("Which model?\n\nA paper.\n\nWe use one.", "a big one"),
    "narrative_qa": ("Who is he?\n\nThe book.\n\nIt ends.", "Mark Hunt"),
    "contract_nli": ("It may end.\n\nThe contract.", "Entailment"),
    "qmsum": ("What was said?\n\nA: well. B: yes.", "They agreed."),
    "gov_report": ("A long report.\n\nIt has parts.", "Short."),
    "summ_screen_fd": ("[ A door opens ]\nA: hi", "A says hi."),
}
HOTPOTQA = {
    "_id": "h0",
    "question": "Where is it?",
    "answer": "in Rome",
    "context": [["One", ["It is.", " In Rome."]], ["Two", ["No."]]],
    "supporting_facts": [["One", 1]],
}
WIKIHOP = {
    "id": "w0",
    "query": "country rome",
    "candidates": ["italy", "france"],
    "supports": ["Rome is there.", "France is not."],
    "answer": "italy",
}
MEDIA_SUM = {"id": "CNN-1", "summary": "They greet.", "utt": ["Hello.", "Good day."]}
PAPER = {
    "article_id": "p0",
    "article_text": ["First .", "Second ."],
    "abstract_text": ["<S> In short . </S>"],
    "section_names": ["intro"],
}
LINES = {
    "cnn_dailymail": {"article": "News came.", "highlights": "It came .\nReally ."},
    "big_patent": {"description": "A device.", "abstract": "It works."},
}

# (query, context, answer) of each data set's first record, in stored order
EXPECTED = {
    "hotpotqa": (
        "[qs]Where is it?[qe]",
        "[ts]One[te][ss]It is.[ss] In Rome.[ts]Two[te][ss]No.",
        "in Rome",
    ),
    "wikihop": (
        "[question]country rome[candidate]italy[candidate]france",
        "[support]Rome is there.[support]France is not.",
        "italy",
    ),
    "quality": (
        "Who ran?\n\n (A) a dog\n (B) a cat\n (C) a cow\n (D) nobody",
        "\n\nA dog ran. (D) no.",
        "a dog",
    ),
    "qasper": ("Which model?", "A paper.\n\nWe use one.", "a big one"),
    "narrative_qa": ("Who is he?", "The book.\n\nIt ends.", "Mark Hunt"),
    "contract_nli": ("It may end.", "The contract.", "Entailment"),
    "qmsum": ("What was said?", "A: well. B: yes.", "They agreed."),
    "gov_report": ("summarize", "A long report.\n\nIt has parts.", "Short."),
    "summ_screen_fd": ("summarize", "[ A door opens ]\nA: hi", "A says hi."),
    "cnn_dailymail": ("summarize", "News came.", "It came .\nReally ."),
    "media_sum": ("summarize", "Hello.\n\nGood day.", "They greet."),
    "multi_news": ("summarize", "One.\nTwo. ||||| Three.", "– All."),
    "arxiv": ("summarize", "First .\nSecond .", " In short . "),
    "pubmed": ("summarize", "First .\nSecond .", " In short . "),
    "big_patent": ("summarize", "A device.", "It works."),
}


def write(folder: pathlib.Path) -> None:
    """Writes `folder/<name>/` for each of `EXPECTED`, as published."""
    for name in EXPECTED:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, (text, output) in SCROLLS.items():
        row = {"id": "i0", "pid": "i0_0", "input": text, "output": output}
        more = row | {"pid": "i0_1", "output": "another"}
        _lines(folder / name / "train.jsonl", [row, more])
        _lines(folder / name / "validation.jsonl", [row, more, row | {"id": "i1"}])
    _list(folder / "hotpotqa" / "hotpot_train_v1.1.json", [HOTPOTQA, HOTPOTQA | {"_id": "h1"}])
    _list(folder / "hotpotqa" / "hotpot_dev_distractor_v1.json", [HOTPOTQA])
    with zipfile.ZipFile(folder / "wikihop" / "qangaroo_v1.1.zip", "w") as archive:
        for split in ("train", "dev"):
            archive.writestr(f"qangaroo_v1.1/wikihop/{split}.json", json.dumps([WIKIHOP] * 2))
    news = [MEDIA_SUM | {"id": "NPR-0"}, MEDIA_SUM, MEDIA_SUM | {"id": "CNN-2"}]
    _list(folder / "media_sum" / "news_dialogue.json", news)
    ids = {"train": ["CNN-1"], "val": ["NPR-0", "CNN-2"], "test": ["none"]}
    (folder / "media_sum" / "train_val_test_split.json").write_text(json.dumps(ids))
    for split in ("train", "val", "test"):
        stem = folder / "multi_news" / split
        stem.with_suffix(".src.cleaned").write_text("One.NEWLINE_CHARTwo. ||||| Three. \n", "utf-8")
        stem.with_suffix(".tgt").write_text("– All.\n", "utf-8")
        for name in ("arxiv", "pubmed"):
            _lines(folder / name / f"{split}.txt", [PAPER])
    for name, row in LINES.items():
        for split in ("train", "validation", "test"):
            _lines(folder / name / f"{split}.jsonl", [row])


def _lines(path: pathlib.Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def _list(path: pathlib.Path, rows: list[Any]) -> None:
    path.write_text(json.dumps(rows), "utf-8")
