"""From a model that can `start` and `step` to sequences, as one compiled function."""

import functools
from typing import Any

import jax
from flax import linen as nn

from jaxmodels.core.generation import check_left_padded
from jaxmodels.decoding.contract import Generated
from jaxmodels.decoding.search import generate
from jaxmodels.decoding.settings import GenerationSettings


class Generator:
    """Generates with one model and one way to choose; compiled once for each shape of inputs.

        generator = decoding.Generator(t5.T5(config), settings)
        found = generator(params, input_ids, attention_mask)

    The parameters as steps read them are made once and kept while calls give the same `params`:
    the decoder's weights are then held twice.

    Attributes:
      model: a module with the methods of `core.generation`.
      settings: how to choose.
    """

    def __init__(self, model: nn.Module, settings: GenerationSettings):
        """Takes the unbound model and the settings; compiles nothing yet."""
        self.model, self.settings = model, settings
        self._run = functools.partial(_generate, model, settings)
        self._compiled = jax.jit(self._run)
        self._prepare = jax.jit(lambda params: model.apply({"params": params}, method="prepare"))
        self._kept: tuple[Any, Any] = (None, None)  # parameters, and what was made of them

    def __call__(
        self,
        params: Any,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        *,
        rng: jax.Array | None = None,
        **inputs: Any,
    ) -> Generated:
        """Generates a continuation (or the decoder's output) for each row.

        Args:
          params: of the model, plain arrays, laid out on devices in any way.
          input_ids: [batch, length] int. Decoder-only prompts are padded on the left, inputs of an
            encoder on the right: see `pad_to_bucket`, so that few lengths are compiled.
          attention_mask: [batch, length], 1 on real tokens; default all ones.
          rng: for settings.do_sample.
          **inputs: what else the model's `start` takes, such as images.

        Raises:
          ValueError: inputs that do not fit together, or sampling without `rng`.
        """
        given = (params, input_ids, attention_mask, rng, inputs)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(given)):
            # Part of somebody's program, who compiles it as they please.
            return self._run(params, None, input_ids, attention_mask, rng, inputs)
        if getattr(self.model, "left_padded", False):
            # Compiled, `start` does not see values.
            check_left_padded(attention_mask, input_ids.shape[1])
        prepared = self._prepared(params)
        return self._compiled(params, prepared, input_ids, attention_mask, rng, inputs)

    def lower(
        self,
        params: Any,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        rng: Any = None,
        **inputs: Any,
    ) -> Any:
        """Returns the lowered program for arrays or shape structs, to look at or compile ahead.

        It takes (params, what `prepare` makes, input_ids, attention_mask, rng, inputs).
        """
        prepared = jax.eval_shape(self._prepare, params)
        return self._compiled.lower(params, prepared, input_ids, attention_mask, rng, inputs)

    def _prepared(self, params: Any) -> Any:
        leaves = jax.tree.leaves(params)
        kept, prepared = self._kept
        same = kept is not None and len(kept) == len(leaves)
        if not same or any(a is not b for a, b in zip(kept, leaves, strict=True)):
            prepared = self._prepare(params)
            self._kept = (leaves, prepared)
        return prepared


def _generate(
    model: nn.Module,
    settings: GenerationSettings,
    params: Any,
    prepared: Any,
    input_ids: jax.Array,
    attention_mask: jax.Array | None,
    rng: jax.Array | None,
    inputs: dict[str, Any],
) -> Generated:
    variables = {"params": params}
    started = model.apply(
        variables,
        input_ids,
        attention_mask,
        max_new_tokens=settings.max_new_tokens,
        prepared=prepared,
        method="start",
        **inputs,
    )

    def step(tokens: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        return model.apply(variables, tokens, cache, started.fixed, method="step")

    return generate(
        step, started.prompt, started.logits, started.cache, settings, rng, started.prompt_mask
    )
