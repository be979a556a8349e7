"""Devices and links of a cluster: data-sheet figures, and the shares of them that runs are assumed to reach."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, replace

from megacog.errors import ConfigError
from megacog.runtime.hardware import peak_tflops

GIB = 2**30

# Name: memory as it is sold, GiB that CUDA reports of it, memory bandwidth in TB/s, bandwidth to the GPUs of the same
# node in GB/s one way, network per GPU in Gbit/s of the vendor's reference system, NVIDIA's compute capability. All but
# the second are of the vendors' data sheets. The second, at least, from what torch ("total capacity") and drivers have
# said in public: pytorch/ao #4002 (B200), levihsu/OOTDiffusion #235 (A100, where others say 79.15), TianheWu/CoSeR #10
# (A100-40GB), stepfun-ai/Step-Video-T2V #8 (L40S), chatdoc-com/OCRFlux #64 (A40: 46068 MiB before CUDA takes its part,
# as the L40S has, both with ECC), Soul-AILab/SoulX-FlashTalk #5 (RTX 4090), GaoLii/DSP #10 (RTX 3090), ROCm/vllm #397
# (MI300X: 201310208 KiB); many reports of 79.1 (H100), 139.8 (H200) and 47.54 (RTX A6000 without ECC).
_DEVICES: dict[str, tuple[float, float, float, float, float, tuple[int, int] | None]] = {
    "H100": (80, 79.1, 3.35, 450, 400, (9, 0)),
    "H200": (141, 139.8, 4.8, 450, 400, (9, 0)),
    "B200": (180, 178.35, 8.0, 900, 400, (10, 0)),
    "A100": (80, 79.15, 2.04, 300, 200, (8, 0)),
    "A100-40GB": (40, 39.5, 1.56, 300, 200, (8, 0)),
    "L40S": (48, 44.42, 0.864, 32, 100, (8, 9)),
    "A40": (48, 44.42, 0.696, 32, 100, (8, 6)),
    "RTX A6000": (48, 47.54, 0.768, 32, 100, (8, 6)),
    "RTX 4090": (24, 23.52, 1.01, 32, 100, (8, 9)),
    "RTX 3090": (24, 23.7, 0.936, 32, 100, (8, 6)),
    "MI300X": (192, 191.98, 5.3, 448, 400, None),
}
_FP8_CAPABILITY = (8, 9)
"""From which on NVIDIA's GPUs multiply e4m3 matrices, as `megacog.parallel.fp8` needs it."""


@dataclass(frozen=True)
class Device:
    """One GPU, or a CPU, of which only the memory is known."""

    name: str
    memory_gib: float
    """That the device reports: less than it is sold with."""
    peak_tflops: float | None = None
    """Dense, at the run's precision."""
    bandwidth: float = 0
    """Of its memory, bytes/s."""
    link: float = 0
    """To other GPUs of its node, bytes/s in one direction."""
    network: float = 0
    """To other nodes, bytes/s in one direction, per GPU."""
    triton: bool = True
    """Whether Triton serves it; else `train.kernels: auto` takes the reference."""
    no_fp8: str | None = None
    """Why it multiplies no e4m3 matrices, if that is known."""

    @property
    def gpu(self) -> bool:
        return self.name != "cpu"


def find_device(name: str | None, memory_gib: float, precision: str) -> Device:
    """The device of that name, or the usual one of that memory.

    Args:
        name: As in the table above, as torch names a device, or "cpu"; None = by memory.
        memory_gib: Of one device: as it is sold (80), for what it reports then, or any other, as it is.
        precision: "bf16" or "fp32".

    Raises:
        ConfigError: Unknown.
    """
    if name is not None and name.lower() == "cpu":
        return Device("cpu", memory_gib)
    if name is None:
        found = next((known for known, facts in _DEVICES.items() if facts[0] == memory_gib), None)
    else:
        matching = [known for known in _DEVICES if re.search(rf"\b{re.escape(known)}\b", name, re.IGNORECASE)]
        found = max(matching, key=len, default=None)
    if found is None:
        what = f"a device of {memory_gib:g} GiB" if name is None else f"device {name!r}"
        raise ConfigError(f"{what} is not known; --device takes {', '.join(_DEVICES)} or cpu, with any memory")
    sold, reported, bandwidth, link, network, capability = _DEVICES[found]
    no_fp8 = None
    if capability is None:
        no_fp8 = f"{found} is none of NVIDIA's"
    elif capability < _FP8_CAPABILITY:
        no_fp8 = f"{found} has {capability[0]}.{capability[1]}"
    peak = peak_tflops(found, precision)
    speeds = (bandwidth * 1e12, link * 1e9, network / 8 * 1e9)
    return Device(found, reported if memory_gib == sold else memory_gib, peak, *speeds, no_fp8=no_fp8)


def reported_gib(memory_gib: float) -> float:
    """What any device that is sold with this memory reports, at least; other sizes as they are."""
    return min((facts[1] for facts in _DEVICES.values() if facts[0] == memory_gib), default=memory_gib)


@dataclass(frozen=True)
class Assumptions:
    """What predictions take for granted; `--assume name=value` changes it."""

    gemm_share: float = 0.73
    """Of the peak in matrix products: 720 of 989 TFLOP/s on an H200, estimated."""
    attention_share: float = 0.32
    """Of the peak in attention at head dim 64, counting the products that are computed: 320 of 989 TFLOP/s, estimated
    from published kernels."""
    bandwidth_share: float = 0.85
    """Of the memory bandwidth in pointwise operators and the optimizer; a copy reaches 4.3 of 4.8 TB/s on an H200."""
    link_share: float = 0.8
    """Of the nominal bandwidth in collectives, within a node and between nodes."""
    host_bandwidth: float = 100e9
    """Of a node's memory in bytes/s, which its ranks share while an offloaded AdamW steps."""
    pcie_bandwidth: float = 25e9
    """Between host and one GPU in bytes/s, one way: of 32 GB/s that 16 lanes of PCIe 4 have."""
    latency: float = 30e-6
    """Seconds of one hop of a collective; a collective of n ranks has log2(n) hops."""
    spread: float = 0.01
    """Standard deviation of the ranks' times of a step, relative; a step waits for the slowest rank."""
    reserved_gib: float = 1.5
    """Memory of the device that tensors cannot have: CUDA context, NCCL's buffers, cuBLAS's workspace."""
    usable_share: float = 0.95
    """Of the rest: the allocator's rounding and fragmentation take 5 %."""

    def changed(self, settings: list[str]) -> Assumptions:
        """With `name=value` settings applied.

        Raises:
            ConfigError: An unknown name, no number, or none that can be.
        """
        known = {field.name for field in fields(self)}
        values = {}
        for setting in settings:
            name, _, value = setting.partition("=")
            try:
                values[name] = float(value)
            except ValueError:
                raise ConfigError(f"--assume {setting}: expected name=number") from None
            if name not in known:
                raise ConfigError(f"--assume {setting}: expected one of {', '.join(sorted(known))}")
            least, most = _limits(name)
            if not least <= values[name] <= most or not math.isfinite(values[name]):
                limits = "not negative" if least == 0 else "positive" if most > 1 else "a share above 0, at most 1"
                raise ConfigError(f"--assume {setting}: expected {limits}")
        return replace(self, **values)


def _limits(name: str) -> tuple[float, float]:
    """Of an assumption: what is divided by is not 0, and shares are shares."""
    if name.endswith("_share"):
        return math.ulp(0), 1
    return (math.ulp(0) if name.endswith("_bandwidth") else 0), math.inf


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs, one rank per GPU."""

    device: Device
    gpus_per_node: int
    nodes: int
    assumptions: Assumptions = Assumptions()

    @property
    def world(self) -> int:
        return self.gpus_per_node * self.nodes

    @property
    def usable_bytes(self) -> float:
        """What tensors of one rank may take."""
        assumed = self.assumptions
        if not self.device.gpu:
            return self.device.memory_gib * GIB / self.gpus_per_node
        return max(0, self.device.memory_gib - assumed.reserved_gib) * assumed.usable_share * GIB

    def resized(self, world: int) -> Cluster:
        """The same nodes, as many as `world` ranks need.

        Raises:
            ConfigError: They would not be whole.
        """
        if world <= self.gpus_per_node:
            return replace(self, gpus_per_node=world, nodes=1)
        if world % self.gpus_per_node:
            raise ConfigError(f"{world} GPUs are no whole nodes of {self.gpus_per_node}")
        return replace(self, nodes=world // self.gpus_per_node)

    def ring_bandwidth(self, ranks: int, neighbors: int = 1) -> float:
        """Bytes/s per rank in a ring of `ranks` ranks that stand `neighbors` apart, in one direction.

        Rings of one node share its links; rings over nodes share the network cards of all GPUs of a node, of which
        every ring leaves through one.
        """
        link = self.device.link * self.assumptions.link_share
        if ranks * neighbors <= self.gpus_per_node:
            return link
        network = self.device.network * self.assumptions.link_share
        return min(link, network * max(1, self.gpus_per_node // neighbors))
