"""What a layer costs by arithmetic, to check the measured programs against.

Forward FLOPs of matrix products (2 a multiply-add) for one sequence: n tokens, d_model = d,
inner width d_ff, segment length g; p VIP slots, m blocks of b tokens, k of them opened. Chunked
attention does up to a few percent more: it rounds the queries up to whole chunks.
"""

from jaxmodels.trunks.bert import BertConfig
from jaxmodels.vcc import compression
from jaxmodels.vcc.encoder import VccConfig


def num_blocks(n: int, vcc: VccConfig) -> int:
    """Returns m, the blocks that `n` tokens make."""
    padded = compression.padded_length(n, vcc.num_vip, vcc.block_size)
    return (padded - vcc.num_vip) // vcc.block_size


def rows_run(n: int, vcc: VccConfig) -> int:
    """Returns the rows a VCC layer runs on: r = p + k b + m - k, and k more if static."""
    k = min(vcc.num_fine_blocks, num_blocks(n, vcc))
    return vcc.compressed_length(n) + (k if vcc.layout == "static" else 0)


def dense_flops(n: int, trunk: BertConfig) -> int:
    """Returns 8 n d^2 (projections) + 4 n^2 d (attention) + 4 n d d_ff (feed-forward)."""
    return _layer(n, n, trunk)


def local_flops(n: int, trunk: BertConfig, segment_length: int) -> int:
    """Returns the dense cost with n^2 -> n g; n is rounded up to whole segments."""
    padded = segment_length * -(-n // segment_length)
    return _layer(padded, segment_length, trunk)


def vcc_flops(n: int, trunk: BertConfig, vcc: VccConfig) -> int:
    """Returns the selection, 2 p d^2 + 2 m d^2 + 2 p m d, and the dense cost of the rows run."""
    d, p, m, rows = trunk.d_model, vcc.num_vip, num_blocks(n, vcc), rows_run(n, vcc)
    return 2 * d * (p * d + m * d + p * m) + _layer(rows, rows, trunk)


def encoder_flops(n: int, trunk: BertConfig, vcc: VccConfig) -> int:
    """Returns the sum over the layers that `vcc.kinds` names."""
    cost = {
        "dense": dense_flops(n, trunk),
        "local": local_flops(n, trunk, vcc.segment_length),
        "vcc": vcc_flops(n, trunk, vcc),
    }
    return sum(cost[kind] for kind in vcc.kinds)


def _layer(queries: int, keys: int, trunk: BertConfig) -> int:
    d = trunk.d_model
    return queries * (8 * d * d + 4 * keys * d + 4 * d * trunk.d_ff)
