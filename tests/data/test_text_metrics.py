"""Exact match, F1, ROUGE and the stemmer under it, on values known from outside."""

import json
import pathlib

import pytest

from jaxmodels.data import porter_stemmer, rouge, text_metrics


def test_stems_are_those_of_the_usual_stemmer() -> None:
    # printed by the NLTK's own documentation of its Porter stemmer
    words = (
        "caresses flies dies mules denied died agreed owned humbled sized meeting stating siezing "
        "itemization sensational traditional reference colonizer plotted"
    )
    stems = (
        "caress fli die mule deni die agre own humbl size meet state siez item sensat tradit refer "
        "colon plot"
    )
    assert [porter_stemmer.stem(word) for word in words.split()] == stems.split()


@pytest.mark.parametrize(
    ("word", "stem"),
    [
        # one word for each rule of Porter's paper
        ("ponies", "poni"), ("caress", "caress"), ("cats", "cat"), ("feed", "feed"),
        ("plastered", "plaster"), ("bled", "bled"), ("motoring", "motor"), ("sing", "sing"),
        ("conflated", "conflat"), ("troubled", "troubl"), ("hopping", "hop"), ("tanned", "tan"),
        ("falling", "fall"), ("hissing", "hiss"), ("fizzed", "fizz"), ("failing", "fail"),
        ("filing", "file"), ("happy", "happi"), ("relational", "relat"),
        ("conditional", "condit"), ("valenci", "valenc"), ("digitizer", "digit"),
        ("radicalli", "radic"), ("differentli", "differ"), ("vileli", "vile"),
        ("analogousli", "analog"), ("vietnamization", "vietnam"), ("predication", "predic"),
        ("operator", "oper"), ("feudalism", "feudal"), ("decisiveness", "decis"),
        ("hopefulness", "hope"), ("callousness", "callous"), ("formaliti", "formal"),
        ("sensitiviti", "sensit"), ("sensibiliti", "sensibl"), ("triplicate", "triplic"),
        ("formative", "form"), ("electrical", "electr"), ("goodness", "good"),
        ("revival", "reviv"), ("airliner", "airlin"), ("replacement", "replac"),
        ("adjustment", "adjust"), ("adoption", "adopt"), ("communism", "commun"),
        ("angulariti", "angular"), ("bowdlerize", "bowdler"), ("probate", "probat"),
        ("rate", "rate"), ("cease", "ceas"), ("controll", "control"), ("roll", "roll"),
        # the NLTK's changes
        ("skies", "sky"), ("dying", "die"), ("enjoy", "enjoy"), ("by", "by"), ("ties", "tie"),
        ("bibliology", "bibliolog"), ("succeed", "succeed"),
    ],
)  # fmt: skip
def test_each_rule_of_the_stemmer(word: str, stem: str) -> None:
    assert porter_stemmer.stem(word) == stem


def test_rouge_of_a_sentence_by_hand() -> None:
    # 4 of 6 words, 2 of 5 pairs, the cat ... the bed in order
    found = rouge.scores("The cat was under the bed.", "the cat sat on the bed")
    assert found == pytest.approx(
        {"rouge1": 2 / 3, "rouge2": 2 / 5, "rougeL": 2 / 3, "rougeLsum": 2 / 3}
    )


def test_rouge_counts_stems_and_repeats_once_each() -> None:
    # run run run cat against run of a cat run: two of three runs, and the cat
    found = rouge.scores("running running running cats", "runs of a cat running")
    assert found["rouge1"] == pytest.approx(2 * 3 / 9)


def test_rouge_of_several_sentences_is_that_of_the_usual_scorer() -> None:
    reference = "The police killed the gunman.\nThe gunman was found dead in a house."
    made = "Police found a dead gunman\nThe police were there"
    found = rouge.scores(made, reference)
    wanted = {"rouge1": 0.545455, "rouge2": 0.2, "rougeL": 0.272727, "rougeLsum": 0.454545}
    assert found == pytest.approx(wanted, abs=1e-6)


def test_empty_texts_score_nothing() -> None:
    for pair in (("", ""), ("a b", ""), ("", "a b"), ("?!", "a")):
        assert set(rouge.scores(*pair).values()) == {0.0}


def test_the_longest_common_subsequence_equals_a_table() -> None:
    def slow(a: str, b: str) -> int:
        row = [0] * (len(b) + 1)
        for x in a:
            before = list(row)
            for j, y in enumerate(b):
                row[j + 1] = before[j] + 1 if x == y else max(before[j + 1], row[j])
        return row[-1]

    for a, b in (("abcbdab", "bdcaba"), ("aaaa", "aa"), ("abc", "xyz"), ("", "a"), ("xaxbx", "ab")):
        assert rouge.lcs_length(list(a), list(b)) == slow(a, b)


def test_sentences_end_before_capitals_but_not_after_titles() -> None:
    text = 'Dr. Smith met the U.S. Senate. It cost 3.5 dollars! "Why?" J. Doe asked.\nA new line'
    assert rouge.split_sentences(text) == [
        "Dr. Smith met the U.S. Senate.",
        "It cost 3.5 dollars!",
        '"Why?"',
        "J. Doe asked.",
        "A new line",
    ]


def test_answers_are_compared_in_squads_normal_form() -> None:
    assert text_metrics.normalize_answer(" The  U.S.A.'s\tan apple, a-day ") == "usas apple aday"
    assert text_metrics.exact_match("the Eiffel Tower!", "Eiffel tower") == 1.0
    assert text_metrics.token_f1("the tall Eiffel Tower", "Eiffel Tower in Paris") == 2 * 2 / 7
    assert text_metrics.token_f1("", "a") == 0.0


def test_the_best_reference_counts_for_each_metric_alone() -> None:
    found = text_metrics.score("two dogs", ["two big dogs", "dogs"], ["f1", "rouge2"])
    assert found == pytest.approx({"f1": 0.8, "rouge2": 0.0})
    with pytest.raises(ValueError, match="one text or more"):
        text_metrics.score("a", [])
    with pytest.raises(ValueError, match="one text or more"):
        text_metrics.score("a", "a")
    with pytest.raises(ValueError, match="no metric is called 'bleu'"):
        text_metrics.score("a", ["a"], ["bleu"])


def test_the_mean_is_over_examples_not_over_batches() -> None:
    total = text_metrics.TextMetrics(["exact_match"])
    total.add_all([("yes", ["Yes."]), ("no", ["yes"]), ("no", ["yes"])])
    assert total.result() == {"exact_match": pytest.approx(1 / 3), "count": 3.0}
    with pytest.raises(ValueError, match="no predictions"):
        text_metrics.TextMetrics().result()


def test_accuracy_is_the_share_of_equal_labels() -> None:
    assert text_metrics.accuracy([1, 2, 3, 3], [1, 2, 0, 3]) == 0.75
    with pytest.raises(ValueError, match="2 predictions and 1 labels"):
        text_metrics.accuracy([1, 2], [1])


def lines(path: pathlib.Path, rows: list[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_command_scores_lines_of_one_or_two_files(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prediction": "The cat.", "references": ["dog", "cat"]}]
    rows += [{"prediction": "a red cow", "references": "red"}]
    text_metrics.main([lines(tmp_path / "one", rows), "--metrics=exact_match,f1"])
    found = json.loads(capsys.readouterr().out)
    assert found == {"exact_match": 0.5, "f1": round((1 + 2 / 3) / 2, 6), "count": 2.0}
    made = lines(tmp_path / "made", [{"answer": "yes"}, {"answer": "no"}])
    wanted = lines(tmp_path / "wanted", [{"output": "Yes!"}, {"output": "no"}])
    flags = ["--prediction_field=answer", "--reference_field=output", "--metrics=rouge1"]
    text_metrics.main([made, f"--references={wanted}", *flags])
    assert json.loads(capsys.readouterr().out) == {"rouge1": 1.0, "count": 2.0}


@pytest.mark.parametrize(
    ("rows", "flags", "words"),
    [
        ([{"prediction": "x"}], [], "line 1: no field 'references'; it has prediction"),
        ([{"prediction": 3, "references": "x"}], [], "line 1: 'prediction' must be a text"),
        ([{"prediction": "x", "references": []}], [], "a list of one text or more"),
        ([["x"]], [], "line 1: an object is wanted"),
        ([], [], "no predictions were scored"),
        ([{"prediction": "x", "references": "x"}], ["--metrics=bleu"], "no metric is called"),
        ([{"prediction": "x"}] * 2, ["--references=SHORT"], "ends before line 2"),
        ([{"prediction": "x"}], ["--references=NONE"], "cannot be read as JSON lines"),
    ],
)
def test_the_command_says_what_it_cannot_score(
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    rows: list[object],
    flags: list[str],
    words: str,
) -> None:
    short = lines(tmp_path / "short", [{"references": "x"}])
    flags = [flag.replace("SHORT", short).replace("NONE", str(tmp_path / "no")) for flag in flags]
    with pytest.raises(SystemExit) as leaving:
        text_metrics.main([lines(tmp_path / "rows", rows), *flags])
    assert leaving.value.code == 2 and words in capsys.readouterr().err
