"""What accelerators can do by their makers' data sheets, and the launch of several of them that a run is planned for."""

from __future__ import annotations

from dataclasses import dataclass

from npt.errors import NPTError

#: What is reached of a data sheet's FLOP/s, and of its bandwidths: assumed, and said beside every time that is predicted.
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
    """How many processes, one per device, on how many nodes, of which kind; `device` None: this machine's own."""

    processes: int = 1
    nodes: int = 1
    device: Device | None = None

    @property
    def wire(self) -> float | None:
        """Bytes per second that each process sends and receives in a ring over all of them; None where it is not known.

        Between nodes the rings share the adapters of a node, which its processes use together.
        """
        if self.device is None:
            return None
        per_node = self.processes // self.nodes
        slowest = self.device.link if self.nodes == 1 else min(self.device.link, per_node * self.device.network)
        return BANDWIDTH_SHARE * slowest


def planned_launch(processes: int = 1, nodes: int = 1, device: str | None = None) -> Launch:
    """The launch of `--processes`, `--nodes` and `--device`.

    Raises:
        NPTError: a device that is not known; processes that don't divide over the nodes.
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
