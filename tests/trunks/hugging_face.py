"""Models of transformers with random weights, and ours with the same weights, through a file."""

import contextlib
import io
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels import decoding, weights
from jaxmodels.decoding.generator import Generator


def randomized(model: Any, size: float = 0.2, seed: int = 0) -> Any:
    """The model with weights far from their initial values: biases and norms count too."""
    import torch

    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name == "final_logits_bias":
                buffer.add_(size * torch.randn_like(buffer))
    return model.eval()


def loaded(model: Any, folder: pathlib.Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Saves the model and reads it back: (family, settings, {"params": our tree})."""
    model.save_pretrained(folder)
    file = weights.read(folder)
    family = weights.detect(file)
    params = weights.import_tree(file, family.rules(file))
    return family.name, family.settings(file), {"params": jax.tree.map(jnp.asarray, params)}


def run(model: Any, **inputs: Any) -> Any:
    """The model's output for numpy inputs."""
    import torch

    with torch.no_grad():
        return model(**{name: torch.tensor(np.asarray(value)) for name, value in inputs.items()})


def generate(model: Any, ids: Any, mask: Any, **settings: Any) -> Any:
    """Sequences and scores of Hugging Face's `generate`."""
    import torch

    # Settings of the model itself (BART: forced eos) would join those asked for.
    model.generation_config.forced_eos_token_id = settings.get("forced_eos_token_id")
    with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
        return model.generate(
            torch.tensor(np.asarray(ids)),
            attention_mask=torch.tensor(np.asarray(mask)),
            **{"do_sample": False} | settings,
            return_dict_in_generate=True,
            output_scores=True,
        )


def our_generation(
    model: Any, variables: Any, ids: Any, mask: Any, **settings: Any
) -> decoding.Generated:
    """What our model generates with the same settings."""
    generator = Generator(model, decoding.GenerationSettings(**settings))
    return generator(variables["params"], jnp.asarray(ids), jnp.asarray(mask))


def same_sequences(found: decoding.Generated, expected: Any, pad_id: int) -> None:
    """Equal tokens; what Hugging Face did not run to is padding; equal scores of beams."""
    sequences = expected.sequences.numpy()
    width = sequences.shape[1]
    np.testing.assert_array_equal(found.sequences[:, :width], sequences)
    assert (np.asarray(found.sequences[:, width:]) == pad_id).all()
    if expected.get("sequences_scores") is not None:
        np.testing.assert_allclose(found.scores, expected.sequences_scores, rtol=1e-4, atol=1e-4)
