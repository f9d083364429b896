"""Token for token what Hugging Face transformers generates, over every setting that we share."""

import contextlib
import io
import itertools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import decoding
from tests.decoding import tables
from tests.decoding.tables import EOS, PAD, VOCAB

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

logging.getLogger("transformers").setLevel(logging.ERROR)


class TableConfig(transformers.PretrainedConfig):
    model_type = "pairs_table"


class TableModel(transformers.PreTrainedModel, transformers.GenerationMixin):
    """The table behind the interface that `generate` drives."""

    config_class = TableConfig
    main_input_name = "input_ids"

    def __init__(self, logits: np.ndarray) -> None:
        super().__init__(TableConfig(vocab_size=VOCAB))
        self.logits = torch.nn.Parameter(torch.from_numpy(logits), requires_grad=False)

    def forward(self, input_ids: Any, attention_mask: Any = None, **_: Any) -> Any:
        before = torch.cat([torch.zeros_like(input_ids[:, :1]), input_ids[:, :-1]], dim=1)
        logits = self.logits[before, input_ids]
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


def reference(model: Any, prompt: Any, mask: Any = None, **settings: Any) -> Any:
    """Runs Hugging Face's `generate`; its scores are those of the processed distribution."""
    known = {"eos_token_id": EOS, "pad_token_id": PAD, "do_sample": False} | settings
    eos = known["eos_token_id"]
    known["eos_token_id"] = list(eos) if isinstance(eos, tuple) else eos
    given = {} if mask is None else {"attention_mask": torch.as_tensor(mask)}
    with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
        return model.generate(
            torch.as_tensor(prompt),
            **given,
            **known,
            use_cache=False,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
        )


def same(found: decoding.Generated, expected: Any, prompt_length: int) -> None:
    """Equal tokens, padding, lengths and scores, after as many steps of the model."""
    sequences = expected.sequences.numpy()
    width = sequences.shape[1]
    np.testing.assert_array_equal(found.sequences[:, :width], sequences)
    assert (np.asarray(found.sequences[:, width:]) == PAD).all()
    assert int(found.lengths.max()) == width - prompt_length
    if found.step_logits is not None:
        assert int(jnp.any(found.step_logits != 0, axis=(1, 2)).sum()) == len(expected.logits)
    if expected.get("sequences_scores") is not None:
        np.testing.assert_allclose(found.scores, expected.sequences_scores, rtol=1e-5, atol=1e-5)


PROMPTS = {
    "start": ([[0], [0], [3]], None),
    "plain": ([[5, 3, 2, 7], [4, 4, 4, 4], [2, 9, 2, 9]], None),
    "left_padded": (
        [[5, 3, 2, 7, 11], [PAD, PAD, PAD, 6, 6], [PAD, 4, 9, 4, 9], [PAD, PAD, PAD, PAD, 8]],
        [[1] * 5, [0, 0, 0, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 0, 1]],
    ),
}

PROCESSORS = {
    "none": {},
    "repetition": {"repetition_penalty": 1.7},
    "repetition_rewarded": {"repetition_penalty": 0.6},
    "unigrams": {"no_repeat_ngram_size": 1},
    "bigrams": {"no_repeat_ngram_size": 2},
    "trigrams": {"no_repeat_ngram_size": 3},
    "minimum": {"min_new_tokens": 6},
    "forced": {"forced_bos_token_id": 5, "forced_eos_token_id": EOS},
    "no_eos": {"eos_token_id": None},
    "three_eos": {"eos_token_id": (EOS, 7, 12)},
    "all": {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 4,
        "forced_bos_token_id": 7,
        "forced_eos_token_id": 12,
        "eos_token_id": (EOS, 12),
    },
}


@pytest.mark.parametrize("kind", ("start", "left_padded"))
@pytest.mark.parametrize("name", PROCESSORS)
def test_greedy_tokens_are_hugging_faces(name: str, kind: str) -> None:
    prompt, mask = PROMPTS[kind]
    for seed in range(3):
        logits = tables.table(seed, eos_bonus=1.5)
        chosen = {"max_new_tokens": 10} | PROCESSORS[name]
        expected = reference(TableModel(logits), prompt, mask, **chosen)
        found = tables.run(logits, prompt, mask, return_logits=True, **chosen)
        same(found, expected, len(prompt[0]))
        steps = len(expected.logits)
        np.testing.assert_array_equal(
            found.step_logits[:steps, 0], torch.stack(expected.logits)[:, 0]
        )
        assert not np.any(found.step_logits[steps:])
        log_probs = torch.stack(expected.scores).log_softmax(-1).numpy()
        new = np.asarray(found.sequences[:, len(prompt[0]) :])
        for row, length in enumerate(np.asarray(found.lengths)):
            total = sum(log_probs[i, row, new[row, i]] for i in range(length))
            np.testing.assert_allclose(found.scores[row], total, rtol=1e-5, atol=1e-5)
            eos = PROCESSORS[name].get("eos_token_id", EOS)
            assert bool(found.finished[row]) == (
                eos is not None and new[row, length - 1] in np.atleast_1d(eos)
            )


EARLY = (False, True, "never")
BEAMS = [
    {"num_beams": beams, "length_penalty": penalty, "early_stopping": early}
    for beams in (2, 5)
    for penalty in (-1.0, 0.0, 1.0, 2.0)
    for early in EARLY
]


@pytest.mark.parametrize(
    ("kind", "chosen"), list(zip(itertools.cycle(PROMPTS), BEAMS, strict=False))
)
def test_beams_are_hugging_faces(kind: str, chosen: dict[str, Any]) -> None:
    prompt, mask = PROMPTS[kind]
    every = {"max_new_tokens": 9, "num_return_sequences": chosen["num_beams"]} | chosen
    for seed, bonus in enumerate((0.0, 1.5, 3.0)):
        logits = tables.table(seed, eos_bonus=bonus)
        expected = reference(TableModel(logits), prompt, mask, **every)
        same(
            tables.run(logits, prompt, mask, return_logits=True, **every), expected, len(prompt[0])
        )


@pytest.mark.parametrize(
    ("kind", "name"), list(zip(itertools.cycle(PROMPTS), PROCESSORS, strict=False))
)
def test_processed_beams_are_hugging_faces(name: str, kind: str) -> None:
    prompt, mask = PROMPTS[kind]
    early = EARLY[len(name) % 3]
    chosen = {"max_new_tokens": 8, "num_beams": 4, "num_return_sequences": 3} | PROCESSORS[name]
    for seed in range(3):
        logits = tables.table(seed, eos_bonus=1.5 * seed)
        expected = reference(TableModel(logits), prompt, mask, early_stopping=early, **chosen)
        found = tables.run(logits, prompt, mask, early_stopping=early, return_logits=True, **chosen)
        same(found, expected, len(prompt[0]))


def torch_step(model: Any, prompt_mask: np.ndarray, **inputs: Any) -> decoding.Step:
    """A step that runs a torch model on all tokens so far: its cache is the tokens and how many.

    `inputs` are those of the encoder, one row an example.
    """

    def logits(tokens: Any, length: Any) -> np.ndarray:
        ids = torch.tensor(np.array(tokens))[:, : int(length)]
        copies = len(ids) // len(prompt_mask)
        given = {k: v.repeat_interleave(copies, 0) for k, v in inputs.items()}
        if inputs:
            given["decoder_input_ids"] = ids
        else:
            mask = torch.ones_like(ids)
            mask[:, : prompt_mask.shape[1]] = torch.tensor(prompt_mask).repeat_interleave(copies, 0)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            given |= {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        with torch.no_grad():
            return model(**given).logits[:, -1].numpy()

    def step(tokens: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        history, length = cache
        history = jax.lax.dynamic_update_slice(history, tokens[:, None], (0, length))
        shape = jax.ShapeDtypeStruct((len(tokens), model.config.vocab_size), jnp.float32)
        return jax.pure_callback(logits, shape, history, length + 1), (history, length + 1)

    return step


def tiny(kind: str) -> tuple[Any, np.ndarray, np.ndarray, dict[str, Any]]:
    """A random model, its prompt and mask, and its encoder inputs."""
    torch.manual_seed(0)
    if kind == "t5":
        config = transformers.T5Config(
            vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=2,
            decoder_start_token_id=0, pad_token_id=PAD, eos_token_id=EOS, initializer_factor=3.0,
        )  # fmt: skip
        inputs = {"input_ids": torch.randint(3, 40, (2, 7)), "attention_mask": torch.ones(2, 7)}
        inputs["attention_mask"][1, 4:] = 0
        prompt = np.zeros((2, 1), np.int32)
        model = transformers.T5ForConditionalGeneration(config)
        return model.eval(), prompt, np.ones_like(prompt), inputs
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.8
    )
    prompt = np.array([[3, 9, 4, 8], [PAD, PAD, 7, 5]], np.int32)
    mask = np.array([[1, 1, 1, 1], [0, 0, 1, 1]], np.int32)
    return transformers.GPT2LMHeadModel(config).eval(), prompt, mask, {}


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_real_models_generate_the_same(kind: str, beams: int) -> None:
    model, prompt, mask, inputs = tiny(kind)
    chosen = {"max_new_tokens": 12, "num_beams": beams, "no_repeat_ngram_size": 3}
    chosen["repetition_penalty"] = 1.2
    given = {k: v for k, v in inputs.items() if k == "attention_mask"}
    expected = (
        reference(model, inputs["input_ids"], given["attention_mask"], **chosen)
        if inputs
        else reference(model, prompt, mask, **chosen)
    )
    step = torch_step(model, mask, **inputs)
    settings = decoding.GenerationSettings(eos_token_id=EOS, pad_token_id=PAD, **chosen)

    @jax.jit
    def program(prompt: jax.Array) -> decoding.Generated:
        history = jnp.pad(prompt[:, :-1], ((0, 0), (0, 13)))
        logits, cache = step(prompt[:, -1], (history, jnp.int32(prompt.shape[1] - 1)))
        found = None if inputs else jnp.asarray(mask)
        return decoding.generate(step, prompt, logits, cache, settings, prompt_mask=found)

    same(program(jnp.asarray(prompt)), expected, prompt.shape[1])


FILTERS = [
    (1.0, 5, 1.0),
    (0.7, 0, 0.8),
    (2.0, 50, 0.3),
    (1.5, 12, 0.95),
    (1.0, 0, 1e-6),
    (1.0, 1, 1.0),
]


@pytest.mark.parametrize(("temperature", "k", "p"), FILTERS)
def test_warpers_cut_what_hugging_faces_cut(temperature: float, k: int, p: float) -> None:
    rng = np.random.default_rng(0)
    plain = rng.normal(0, 3, (20, 30)).astype(np.float32)
    ties = rng.integers(-2, 3, (20, 30)).astype(np.float32)
    known = decoding.GenerationSettings(do_sample=True, temperature=temperature, top_k=k, top_p=p)
    warpers = [transformers.TemperatureLogitsWarper(temperature)]
    warpers += [transformers.TopKLogitsWarper(k)] if k else []
    warpers += [transformers.TopPLogitsWarper(p)] if p < 1 else []
    for logits in (plain, ties):
        expected = torch.from_numpy(logits)
        for warper in warpers:
            expected = warper(None, expected)
        found = np.asarray(decoding.filter_logits(jnp.asarray(logits), known))
        if logits is ties:  # torch leaves open which of equal logits it cuts
            found, expected = np.sort(found), expected.sort().values
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)
