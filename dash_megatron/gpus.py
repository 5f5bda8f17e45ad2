"""GPUs that plans and utilization know, by the vendor's data sheets: SXM parts, but for L40S, which has PCIe."""

from typing import NamedTuple


class GPU(NamedTuple):
    """One kind of GPU."""

    compute_capability: tuple[int, int]
    peak_flops: float
    """Dense bf16 operations per second."""
    memory_gib: float
    """Memory that can be used."""
    memory_bandwidth: float
    """Bytes per second."""
    link_bandwidth: float
    """Bytes per second of the links inside a node, in one direction."""


GPUS = {
    "B200": GPU((10, 0), 2.25e15, 178.0, 8.0e12, 900e9),
    "H200": GPU((9, 0), 989e12, 140.0, 4.8e12, 450e9),
    "H100": GPU((9, 0), 989e12, 79.0, 3.35e12, 450e9),
    "H800": GPU((9, 0), 989e12, 79.0, 3.35e12, 200e9),
    "A100": GPU((8, 0), 312e12, 79.0, 2.0e12, 300e9),
    "L40S": GPU((8, 9), 362e12, 44.0, 0.86e12, 32e9),
}
