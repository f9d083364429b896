"""What the VCC layers opened, in words of the text: for reports and predictions."""

import jax
import numpy as np

from jaxmodels.vcc.config import VccConfig


def block_ranges(opened: dict[str, jax.Array], vcc: VccConfig, row: int = 0) -> list:
    """Returns, a VCC layer each, the [first, last] token of every opened block, best first.

    Args:
      opened: as an encoder returns it (see `VccEncoder`); empty gives an empty list.
      vcc: of that encoder.
      row: of the batch.
    """
    if not opened:
        return []
    blocks = np.asarray(opened["order"])[row, vcc.num_vip :].reshape(-1, vcc.block_size)
    return [
        [[int(blocks[j].min()), int(blocks[j].max())] for j in layer if j >= 0]
        for layer in np.asarray(opened["fine_blocks"])[:, row]
    ]
