"""VCC-RoBERTa: embeddings, the mixed stack, and models with a head on top (section 3.6)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.trunks import bert
from jaxmodels.vcc import heads
from jaxmodels.vcc.config import VccConfig
from jaxmodels.vcc.encoder import VccEncoder


class VccRoberta(nn.Module):
    """RoBERTa whose layers compress around VIP tokens.

    Parameters are those of a pre-norm `bert.BertModel` of the same sizes.

    Attributes:
      trunk: sizes; norm_order "pre".
      vcc: how to compress, and the kind of every layer.

    Raises:
      ValueError: a post-norm trunk, a list of kinds of another length than num_layers, or
        cross-attention.
    """

    trunk: bert.BertConfig
    vcc: VccConfig

    def setup(self) -> None:
        if self.trunk.norm_order != "pre":
            raise ValueError(
                f"model.norm_order={self.trunk.norm_order!r}: VCC layers are pre-norm; use 'pre'."
            )
        if len(self.vcc.kinds) != self.trunk.num_layers:
            raise ValueError(
                f"{len(self.vcc.kinds)} layer kinds for model.num_layers={self.trunk.num_layers}; "
                "give one kind a layer."
            )
        if self.vcc.cross_attention != "tokens":
            raise ValueError(
                f"model.cross_attention={self.vcc.cross_attention!r}: RoBERTa has no decoder that "
                "would attend; use 'tokens'."
            )
        self.embeddings = self.trunk.make_embeddings("embeddings")
        self.encoder = VccEncoder(self.trunk, self.vcc)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        vip_mask: jax.Array,
        token_type_ids: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Encodes ids.

        Args:
          input_ids: [batch, length] int.
          attention_mask: [batch, length], 1 on real tokens.
          vip_mask: [batch, length], 1 on VIP tokens (`inputs.check_inputs` checks them).
          token_type_ids: [batch, length] int; default zeros.
          position_ids: [batch, length] int from 0, below max_positions; default 0, 1, 2, ...
          deterministic: no dropout, no exploration; else an rng named "dropout" is needed.

        Returns:
          hidden states [batch, length, d_model] float32 in text order, and what each VCC layer
          opened (see `VccEncoder`).

        Raises:
          ValueError: no position ids, and the input is longer than the position table.
        """
        if position_ids is None:
            bert.check_length(input_ids.shape[1], self.trunk.max_positions)
            position_ids = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        x = self.embeddings(input_ids, position_ids, token_type_ids, deterministic)
        return self.encoder(x, attention_mask, vip_mask, deterministic)


def gather_tokens(hidden: jax.Array, index: jax.Array) -> jax.Array:
    """Returns the states at token indices: [B, n, d], [B, q] -> [B, q, d]."""
    return jnp.take_along_axis(hidden, index[..., None], axis=1)


class VccWithHead(nn.Module):
    """A trunk and one head: parameters `{"trunk": ..., head name: ...}`.

    Attributes:
      trunk: sizes.
      vcc: how to compress.
      head: "mlm_head", "classifier" (multiple choice), "classification" or "hotpotqa".
      num_classes: of "classification".
    """

    trunk: bert.BertConfig
    vcc: VccConfig
    head: str
    num_classes: int = 2

    def setup(self) -> None:
        self.body = VccRoberta(self.trunk, self.vcc, name="trunk")
        make: dict[str, Any] = {
            "mlm_head": lambda: bert.MLMHead(
                self.trunk.vocab_size, self.trunk.norm_eps, self.trunk.dtype
            ),
            "classifier": heads.MultipleChoiceHead,
            "classification": lambda: heads.ClassificationHead(self.num_classes),
            "hotpotqa": heads.HotpotQAHead,
        }
        if self.head not in make:
            raise ValueError(f"model.head={self.head!r}: use one of {', '.join(make)}.")
        setattr(self, self.head, make[self.head]())

    def __call__(self, batch: dict[str, jax.Array], deterministic: bool = True) -> Any:
        """Runs trunk and head.

        Args:
          batch: `input_ids`, `attention_mask`, `vip_mask` [batch, length] (and optionally
            `token_type_ids`, `position_ids`); `masked_positions` [batch, q] for "mlm_head",
            `candidate_positions` [batch, c] for "classifier".
          deterministic: no dropout, no exploration.

        Returns:
          what the head returns.
        """
        hidden, _ = self.body(
            batch["input_ids"],
            batch["attention_mask"],
            batch["vip_mask"],
            batch.get("token_type_ids"),
            batch.get("position_ids"),
            deterministic,
        )
        head = getattr(self, self.head)
        if self.head == "mlm_head":
            return head(gather_tokens(hidden, batch["masked_positions"]))
        if self.head == "classifier":
            return head(gather_tokens(hidden, batch["candidate_positions"]))
        return head(hidden)
