"""What a node's network has done so far, by the kernel's counters of its namespace.

Counters, unlike times, do not depend on what else the machine does; tests assert these.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

LINK, LOOPBACK = "eth0", "lo"
_ESTABLISHED = "01"


@dataclasses.dataclass(frozen=True)
class Counters:
    """Sums since the namespace was made.

    Attributes:
      segments: TCP segments sent, loopback included.
      retransmitted: of those, sent again.
      link_bytes: sent over the link, headers included.
      link_packets: packets of that; the kernel hands on up to 64 KB as one.
      loopback_bytes: sent from device to device of the node.
    """

    segments: int
    retransmitted: int
    link_bytes: int
    link_packets: int
    loopback_bytes: int

    def since(self, before: "Counters", runs: int = 1) -> dict[str, float]:
        """Returns the differences from `before`, a run."""
        own, old = dataclasses.asdict(self), dataclasses.asdict(before)
        return {name: (own[name] - old[name]) / runs for name in own}


def parse(snmp: str, dev: str) -> Counters:
    """Returns the counters from the texts of /proc/net/snmp and /proc/net/dev."""
    names, values = (line.split()[1:] for line in snmp.splitlines() if line.startswith("Tcp:"))
    tcp = dict(zip(names, map(int, values), strict=True))
    sent = {}
    for line in dev.splitlines()[2:]:
        interface, numbers = line.split(":")
        fields = numbers.split()
        sent[interface.strip()] = int(fields[8]), int(fields[9])  # transmitted: bytes, packets
    link, loopback = (sent.get(name, (0, 0)) for name in (LINK, LOOPBACK))
    return Counters(tcp["OutSegs"], tcp["RetransSegs"], *link, loopback[0])


def read() -> Counters:
    """Returns the counters of this process's namespace."""
    return parse(Path("/proc/net/snmp").read_text(), Path("/proc/net/dev").read_text())


def connections(tcp: str, without_port: int) -> int:
    """Returns how many established connections lead to another node.

    Args:
      tcp: the text of /proc/net/tcp.
      without_port: connections from or to this port do not count (the coordinator's).
    """
    return sum(_leads_away(line.split(), without_port) for line in tcp.splitlines()[1:])


def _leads_away(fields: list[str], without_port: int) -> bool:
    local, remote = (field.split(":") for field in fields[1:3])
    ports = {int(port, 16) for _, port in (local, remote)}
    return fields[3] == _ESTABLISHED and local[0] != remote[0] and without_port not in ports


def mean(found: Iterable[dict[str, float]]) -> dict[str, float]:
    """Returns the mean of each counter over nodes."""
    rows = list(found)
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
