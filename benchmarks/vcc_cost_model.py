"""What a layer costs by arithmetic, to check the measured programs against.

Forward FLOPs of matrix products (2 a multiply-add) for one sequence: n tokens, d_model = d,
inner width d_ff, segment length g; p VIP slots, m blocks of b tokens, k of them opened. Chunked
attention does up to a few percent more: it rounds the queries up to whole chunks.
"""

from jaxmodels.trunks.bert import BertConfig
from jaxmodels.trunks.t5 import T5Config
from jaxmodels.vcc import compression
from jaxmodels.vcc.baseline_attentions import BigBird, LongT5, SparsePattern, Window
from jaxmodels.vcc.encoder import VccConfig


def num_blocks(n: int, vcc: VccConfig) -> int:
    """Returns m, the blocks that `n` tokens make."""
    padded = compression.padded_length(n, vcc.num_vip, vcc.block_size)
    return (padded - vcc.num_vip) // vcc.block_size


def rows_run(n: int, vcc: VccConfig) -> int:
    """Returns the rows a VCC layer runs on: r = p + k b + m - k, and k more if static."""
    k = min(vcc.num_fine_blocks, num_blocks(n, vcc))
    return vcc.compressed_length(n) + (k if vcc.layout == "static" else 0)


def dense_flops(n: int, trunk: BertConfig | T5Config) -> int:
    """Returns 8 n d^2 (projections) + 4 n^2 d (attention) + 4 n d d_ff (feed-forward)."""
    return _layer(n, n, trunk)


def local_flops(n: int, trunk: BertConfig | T5Config, segment_length: int) -> int:
    """Returns the dense cost with n^2 -> n g; n is rounded up to whole segments."""
    padded = segment_length * -(-n // segment_length)
    return _layer(padded, segment_length, trunk)


def vcc_flops(n: int, trunk: BertConfig | T5Config, vcc: VccConfig) -> int:
    """Returns the selection, 2 p d^2 + 2 m d^2 + 2 p m d, and the dense cost of the rows run."""
    d, inner = trunk.d_model, _inner(trunk)
    p, m, rows = vcc.num_vip, num_blocks(n, vcc), rows_run(n, vcc)
    return 2 * inner * (p * d + m * d + p * m) + _layer(rows, rows, trunk)


def encoder_flops(n: int, trunk: BertConfig | T5Config, vcc: VccConfig) -> int:
    """Returns the sum over the layers that `vcc.kinds` names."""
    cost = {
        "dense": dense_flops(n, trunk),
        "local": local_flops(n, trunk, vcc.segment_length),
        "vcc": vcc_flops(n, trunk, vcc),
    }
    return sum(cost[kind] for kind in vcc.kinds)


def sparse_flops(
    n: int, trunk: BertConfig | T5Config, pattern: SparsePattern, executed: bool = True
) -> int:
    """Returns the cost of a layer of a baseline: the dense one with fewer keys a query.

    LongT5's summaries add their keys and values, 4 G d d_i.

    Args:
      n: tokens.
      trunk: sizes.
      pattern: of the baseline.
      executed: what chunks of queries compute, 3/2 of a window of w keys; else the w keys alone,
        as papers count.
    """
    d, inner = trunk.d_model, _inner(trunk)
    summaries = n // pattern.global_block_size if pattern.summarises else 0
    pairs = _pairs(n, pattern) if executed else n * _keys(n, pattern)
    return _layer(n, 0, trunk) + 4 * pairs * inner + 4 * summaries * d * inner


def _pairs(n: int, pattern: SparsePattern) -> int:
    """Pairs of query and key that the chunks of a baseline compute."""
    if isinstance(pattern, BigBird):
        if pattern.is_dense(n):
            return n * n
        block, blocks = pattern.block_size, -(-n // pattern.block_size)
        few = (5 + pattern.num_random_blocks) * block
        return (blocks - 2) * block * few + 2 * block * n  # the end blocks see everything
    side = pattern.window // 2 if isinstance(pattern, Window) else pattern.radius + 1
    chunk = min(side, n)
    rows = chunk * -(-n // chunk)
    if isinstance(pattern, Window):
        few = min(pattern.num_global, n)
        return rows * (3 * chunk + few) + few * n
    summaries = n // pattern.global_block_size if pattern.summarises else 0
    return rows * (3 * chunk + summaries)


def _keys(n: int, pattern: SparsePattern) -> int:
    """Keys a query, as papers count."""
    if isinstance(pattern, Window):
        return pattern.window
    if isinstance(pattern, LongT5):
        summaries = n // pattern.global_block_size if pattern.summarises else 0
        return 3 * (pattern.radius + 1) + summaries
    return (5 + pattern.num_random_blocks) * pattern.block_size


def _inner(trunk: BertConfig | T5Config) -> int:
    """Width of all heads together, d_i."""
    return trunk.num_heads * getattr(trunk, "head_dim", trunk.d_model // trunk.num_heads)


def _layer(queries: int, keys: int, trunk: BertConfig | T5Config) -> int:
    d, inner = trunk.d_model, _inner(trunk)
    matrices = 3 if getattr(trunk, "gated", False) else 2
    return queries * (8 * d * inner + 4 * keys * inner + 2 * matrices * d * trunk.d_ff)
