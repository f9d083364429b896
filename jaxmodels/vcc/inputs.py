"""Checks of masks on the host, where an error can still say what is wrong (section 12)."""

import logging
from typing import Any

import numpy as np

_log = logging.getLogger(__name__)
_warned: set[str] = set()


def _zero_one(name: str, mask: Any) -> np.ndarray:
    array = np.asarray(mask)
    if not np.isin(array, (0, 1)).all():
        bad = array[~np.isin(array, (0, 1))].flat[0]
        raise ValueError(f"{name} holds {bad}; accepted are 0 and 1 (bool, int or float).")
    return array.astype(np.int32)


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        _log.warning(message)


def check_inputs(
    attention_mask: Any, vip_mask: Any, num_vip: int, overflow: str = "error"
) -> tuple[np.ndarray, np.ndarray]:
    """Checks and normalises the two masks of a batch or of one sequence.

    Args:
      attention_mask: [..., n], 1 on real tokens; bool, int or float.
      vip_mask: [..., n], 1 on VIP tokens.
      num_vip: p, the slots that a VCC model has.
      overflow: what to do with more VIPs than slots: "error", "warn" (once) or "demote": the ones
        latest in the text become ordinary tokens and lose their vote.

    Returns:
      both masks as int32.

    Raises:
      ValueError: values other than 0 and 1, different shapes, a VIP on padding, or more VIPs than
        slots under "error".
    """
    mask = _zero_one("attention_mask", attention_mask)
    vip = _zero_one("vip_mask", vip_mask)
    if mask.shape != vip.shape:
        raise ValueError(
            f"attention_mask {mask.shape} and vip_mask {vip.shape} differ; both are [..., length]."
        )
    padded = int(((mask == 0) & (vip == 1)).sum())
    if padded:
        raise ValueError(f"{padded} VIP tokens lie on padding; set vip_mask to 0 there.")
    counts = vip.sum(axis=-1)
    most, least = int(counts.max(initial=0)), int(counts.min(initial=num_vip))
    if most > num_vip:
        message = (
            f"{most} VIP tokens, but num_vip={num_vip} slots; raise model.num_vip, mark fewer, or "
            "set model.overflow to 'demote' to treat the last ones as ordinary tokens."
        )
        if overflow == "error":
            raise ValueError(message)
        if overflow == "warn":
            _warn_once(message)
    if least == 0:
        _warn_once("a sequence has no VIP token: the first blocks are opened, whatever they hold.")
    return mask, vip
