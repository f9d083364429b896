"""The compressed state of VCC: opening blocks, closing them, entering and leaving (K1, K2, K3)."""

from kernels_pallas.vip_compression.api import (
    BACKENDS,
    enter,
    leave,
    open_blocks,
    refine,
    supports,
    write_back,
)

__all__ = ["BACKENDS", "enter", "leave", "open_blocks", "refine", "supports", "write_back"]
