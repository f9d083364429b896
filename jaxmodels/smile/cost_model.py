"""Predicted times of one exchange, flat against two hops, from rates of links (section 13).

A model, not a measurement. B is the buffer of a device: capacity_factor * tokens * d_model * bytes.
All rates are one way, in bytes per second and device; all times in seconds.
"""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Buffer:
    """What a device sends in one exchange.

    Attributes:
      tokens_per_device: T.
      d_model: d.
      bytes_per_element: 2 for bfloat16.
      capacity_factor: slots by tokens.
    """

    tokens_per_device: int
    d_model: int
    bytes_per_element: int = 2
    capacity_factor: float = 1.0

    @property
    def size(self) -> float:
        """B, bytes."""
        per_token = self.d_model * self.bytes_per_element
        return self.capacity_factor * self.tokens_per_device * per_token


@dataclasses.dataclass(frozen=True)
class GpuCluster:
    """n nodes of m GPUs.

    Attributes:
      nodes: n.
      devices: m.
      nvlink_oneway: between GPUs of a node.
      nic_per_gpu: of the network between nodes.
      alpha_msg: seconds a message between nodes costs to start.
      alpha_nvlink: the same inside a node.
      s_half: bytes of a message that reaches half of the network's rate.
    """

    nodes: int
    devices: int
    nvlink_oneway: float
    nic_per_gpu: float
    alpha_msg: float = 10e-6
    alpha_nvlink: float = 2e-6
    s_half: float = 256 * 1024

    def predict(self, buffer: Buffer) -> dict[str, float]:
        """Returns times, messages and bytes of one exchange by name; see section 13 (a)."""
        n, m, size = self.nodes, self.devices, buffer.size
        cells = n * m
        between = (n - 1) / n * size
        flat = max(
            between / (self.nic_per_gpu * self._efficiency(size / cells)),
            (m - 1) / cells * size / self.nvlink_oneway,
        )
        inter = between / (self.nic_per_gpu * self._efficiency(size / n))
        inter += (n - 1) * self.alpha_msg
        intra = (m - 1) / m * size / self.nvlink_oneway + (m - 1) * self.alpha_nvlink
        return {
            "buffer_bytes": size,
            "t_flat": flat + (cells - 1) * self.alpha_msg,
            "t_inter": inter,
            "t_intra": intra,
            "t_two_hop": inter + intra,
            "message_bytes_flat": size / cells,
            "message_bytes_inter": size / n,
            "message_bytes_intra": size / m,
            "peers_flat": cells - 1,
            "peers_two_hop": n - 1 + m - 1,
            "internode_bytes": between,
        }

    def _efficiency(self, message: float) -> float:
        return message / (message + self.s_half)


@dataclasses.dataclass(frozen=True)
class Torus:
    """One TPU slice.

    Attributes:
      dims: chips along each dimension.
      wrap: whether a dimension closes to a ring.
      link_oneway: rate of one link.
      node_axes: leading dimensions that the mesh axis `node` takes; the rest are `device`.
    """

    dims: tuple[int, ...]
    wrap: tuple[bool, ...]
    link_oneway: float
    node_axes: int = 1

    def dimension_times(self, size: float) -> list[float]:
        """Returns the time of an exchange along each dimension, by its bisection."""
        return [
            chips * size / ((8 if ring else 4) * self.link_oneway)
            for chips, ring in zip(self.dims, self.wrap, strict=True)
        ]

    def predict(self, buffer: Buffer) -> dict[str, float]:
        """Returns the times of one exchange by name; see section 13 (c)."""
        times = self.dimension_times(buffer.size)
        inter = max(times[: self.node_axes], default=0.0)
        intra = max(times[self.node_axes :], default=0.0)
        return {
            "buffer_bytes": buffer.size,
            "t_flat": max(times),
            "t_inter": inter,
            "t_intra": intra,
            "t_two_hop": inter + intra,
        }


@dataclasses.dataclass(frozen=True)
class Multislice:
    """Several TPU slices joined by the data-centre network.

    Attributes:
      slices: n.
      slice: one of them.
      dcn_per_chip: rate of the data-centre network.
      pcie_per_chip: rate between chip and host, where transfers are staged.
    """

    slices: int
    slice: Torus
    dcn_per_chip: float
    pcie_per_chip: float

    def predict(self, buffer: Buffer) -> dict[str, float]:
        """Returns lower bounds of the times of one exchange by name; see section 13 (b)."""
        n, size, chips = self.slices, buffer.size, math.prod(self.slice.dims)
        dcn = (n - 1) / n * size / self.dcn_per_chip
        host = size / self.pcie_per_chip
        ici = max(self.slice.dimension_times(size))
        return {
            "buffer_bytes": size,
            "t_dcn": dcn,
            "t_host": host,
            "t_ici": ici,
            "t_flat_lower_bound": max(dcn, host),
            "t_two_hop_lower_bound": max(dcn, host) + ici,
            "dcn_peers_flat": n * chips - 1,
            "dcn_peers_two_hop": n - 1,
        }


# (NVLink, network) a GPU, one way. The network of p4d is 400 Gb/s a node of eight, of the others
# 8 x 400 Gb/s.
GPU_RATES = {
    "p4d": (300e9, 6.25e9),
    "h100": (450e9, 50e9),
    "h200": (450e9, 50e9),
    "b200": (900e9, 50e9),
}
# (link, data-centre network, host) a chip, one way.
TPU_RATES = {
    "v5e": (45e9, 3.125e9, 15e9),
    "v5p": (90e9, 6.25e9, 15e9),
    "v6e": (90e9, 12.5e9, 32e9),
}
