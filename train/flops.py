"""Counts the FLOPs of a traced function and knows the peak rate of devices: what MFU is made of.

The count comes from the traced program, not from XLA's cost analysis, because that one counts the
body of a loop once however often it runs, and our layers are a loop. Only matrix products and
convolutions count (2 FLOPs a multiply-add), as is usual for MFU; what remat computes again counts.
"""

import math
from collections.abc import Iterator
from typing import Any

# Dense bfloat16 peak in FLOP/s a device as jax lists them; the makers' data sheets. A v4 or v5p
# device is a chip, a TPU7x device half of one. The longest name that the device kind starts with
# decides.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}

# Products of queries with keys in cuDNN's attention, which the traced program holds as one step:
# scores and mix; backward the scores again, and the gradients of weights, queries, keys, values.
_FUSED_PRODUCTS = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}


def peak_flops(device_kind: str) -> float | None:
    """Returns the dense bfloat16 peak of a device in FLOP/s, or None where it is not known."""
    known = [name for name in PEAKS if device_kind.lower().startswith(name.lower())]
    return PEAKS[max(known, key=len)] if known else None


def count_flops(jaxpr: Any) -> int:
    """Returns the FLOPs of one run of a traced function, all devices together.

    Args:
      jaxpr: of `jax.make_jaxpr(f)(...)` or `jax.jit(f).trace(...).jaxpr`. A `while_loop` counts
        one turn of its body, a `cond` its dearest branch.
    """
    return sum(_equation_flops(equation) for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _equation_flops(equation: Any) -> int:
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        return _dot_flops(equation)
    if name == "conv_general_dilated":
        return _convolution_flops(equation)
    if name in _FUSED_PRODUCTS:
        return _FUSED_PRODUCTS[name] * _fused_attention_flops(equation)
    inner = [count_flops(jaxpr) for jaxpr in _inner_jaxprs(parameters)]
    if not inner:
        return 0
    if name == "scan":
        return parameters["length"] * sum(inner)
    if name == "cond":
        return max(inner)
    if name == "shard_map":  # the body is one device's part
        return math.prod(parameters["mesh"].shape.values()) * sum(inner)
    if name == "pallas_call":
        return _kernel_flops(parameters, sum(inner))
    if name.startswith("custom_"):  # the rules of its derivative are functions beside the body
        return inner[0]
    return sum(inner)


def _inner_jaxprs(parameters: dict[str, Any]) -> Iterator[Any]:
    for value in parameters.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(getattr(item, "jaxpr", item), "eqns"):
                yield item


def _dot_flops(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    depth = math.prod(left[axis] for axis in contracted)
    return 2 * depth * math.prod(equation.outvars[0].aval.shape)


def _convolution_flops(equation: Any) -> int:
    """Each output value takes the kernel's window times its input channels (a group's alone)."""
    kernel = equation.invars[1].aval.shape
    out_channels = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // out_channels


def _fused_attention_flops(equation: Any) -> int:
    """One product of queries [B, Q, H, D] with keys [B, K, H, D], over all heads."""
    query, key = equation.invars[0].aval.shape, equation.invars[1].aval.shape
    return 2 * math.prod(query) * key[1]


def _kernel_flops(parameters: dict[str, Any], body: int) -> int:
    """A Pallas kernel says itself what it costs; else its body counts once a grid cell."""
    estimate = parameters.get("cost_estimate")
    if estimate is not None:
        return int(estimate.flops)
    return body * math.prod(parameters["grid_mapping"].grid)
