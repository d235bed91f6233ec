"""The devices that a run is planned for: accelerators by their makers' data sheets, or this machine by measurement."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil  # type: ignore[import-untyped]
import torch

from npt.errors import NPTError

#: The share of a data sheet's FLOP/s, and of its bandwidths, that is reached. Assumed, and printed beside predicted times.
EFFICIENCY, BANDWIDTH_SHARE = 0.4, 0.7


@dataclass(frozen=True)
class Device:
    """One accelerator as its data sheet describes it.

    memory: bytes, in the sheet's decimal gigabytes; torch finds some 5 % more, which is left for the driver, NCCL and the
    allocator. flops: 16-bit products per second, dense. bandwidth: bytes per second of its memory. link: bytes per second
    and direction to the other accelerators of its node. network: the same to other nodes, one adapter per accelerator.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    link: float
    network: float


#: NVIDIA A100 80GB SXM: "NVIDIA A100 Tensor Core GPU" data sheet (312 TFLOP/s, 2,039 GB/s, NVLink 600 GB/s both ways
#: together) and "NVIDIA DGX A100" data sheet (eight 200 Gb/s adapters). H100 80GB SXM: "NVIDIA H100 Tensor Core GPU" data
#: sheet (1,979 TFLOP/s with sparsity, half of it dense, 3.35 TB/s, NVLink 900 GB/s) and "NVIDIA DGX H100" (eight 400 Gb/s
#: adapters). H200 SXM: "NVIDIA H200 Tensor Core GPU" data sheet (141 GB, 4.8 TB/s, else as H100) and "NVIDIA DGX H200".
DEVICES = {
    device.name: device
    for device in (
        Device("a100-80gb", 80 * 10**9, 312e12, 2.039e12, 300e9, 25e9),
        Device("h100-80gb", 80 * 10**9, 989.5e12, 3.35e12, 450e9, 50e9),
        Device("h200", 141 * 10**9, 989.5e12, 4.8e12, 450e9, 50e9),
    )
}


@dataclass(frozen=True)
class Launch:
    """The processes of a run, one per device, and the nodes that they are spread over evenly.

    device: of each process; None for this machine's own, of which no data sheet is known.
    """

    processes: int = 1
    nodes: int = 1
    device: Device | None = None

    @property
    def wire(self) -> float | None:
        """Bytes per second that each process sends and receives in a ring over all of them; None without a data sheet.

        Between nodes, the rings of a node's processes use all of its network adapters together.
        """
        if self.device is None:
            return None
        per_node = self.processes // self.nodes
        slowest = self.device.link if self.nodes == 1 else min(self.device.link, per_node * self.device.network)
        return BANDWIDTH_SHARE * slowest


def planned_launch(processes: int = 1, nodes: int = 1, device: str | None = None) -> Launch:
    """The launch of `--processes`, `--nodes` and `--device`.

    Raises:
        NPTError: the device is not known, or the processes don't divide evenly over the nodes.
    """
    if device is not None and device not in DEVICES:
        raise NPTError(
            f"--device {device}: not known; use one of {', '.join(DEVICES)}, or leave it out and give --limit"
        )
    for name, value in (("--processes", processes), ("--nodes", nodes)):
        if value < 1:
            raise NPTError(f"{name} {value}: use a whole number from 1 up")
    if processes % nodes:
        raise NPTError(
            f"--nodes {nodes}: does not divide --processes {processes}; give all nodes equally many processes"
        )
    return Launch(processes, nodes, None if device is None else DEVICES[device])


def device_memory(device: torch.device) -> int:
    """Bytes that a run may use on this machine: all of the GPU's memory, or the free part of main memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().available)


@torch.no_grad()
def machine_speed(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> tuple[float, float]:
    """(floating point operations, bytes moved) per second of this machine, measured on a product and a sum of medium size."""
    x, w = (torch.ones(shape, dtype=dtype, device=device) for shape in ((1024, 1024), (1024, 2816)))
    wide = torch.ones(2**23, dtype=dtype, device=device)
    products = _rate(lambda: x @ w, 2 * x.shape[0] * w.numel(), seconds, device)
    return products, _rate(lambda: wide + wide, 3 * wide.numel() * wide.element_size(), seconds, device)


def _rate(run: Callable[[], object], work: float, seconds: float, device: torch.device) -> float:
    """Work per second: `work` over the median time of runs that take `seconds` together."""
    times: list[float] = []
    run()
    while sum(times) < seconds:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return work / sorted(times)[len(times) // 2]


def parse_bytes(text: str) -> int:
    """The bytes of "24GiB" or "24 GB".

    Raises:
        NPTError: the text is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise NPTError(f"--limit {text}: not a size; write a number and a unit, such as 24GiB")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(unit.upper()) + 1 if unit else 0))
