"""GPUs by their published figures, and how much of them real kernels are taken to reach.

Sources: NVIDIA data sheets of H100 SXM, H200 SXM and DGX B200 (FLOP/s without sparsity, NVLink for
one direction); H800: an H100 whose NVLink has 400 GB/s both ways (DeepSeek-V3's hardware paper,
arXiv 2505.09343); H20: 96 GB, 4.0 TB/s, 148 and 296 TFLOP/s, as sellers of HGX H20 publish.  NIC: a
400 Gb/s port for each GPU, as in DGX systems.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

GiB = 2**30


@dataclass(frozen=True)
class GPU:
    """One device and its share of the node.

    Attributes:
        name: as printed.
        memory: bytes.
        bandwidth: of the memory, bytes/s.
        bf16, fp8: dense FLOP/s.
        nvlink, nic, pcie: bytes/s of each direction.
        host_memory: bytes of a node of 8.
    """

    name: str
    memory: float
    bandwidth: float
    bf16: float
    fp8: float
    nvlink: float
    nic: float = 50e9
    pcie: float = 64e9
    host_memory: float = 2048 * GiB


HARDWARE = {
    "h100": GPU("H100 SXM 80 GB", 80e9, 3.35e12, 989e12, 1979e12, 450e9),
    "h200": GPU("H200 SXM 141 GB", 141e9, 4.8e12, 989e12, 1979e12, 450e9),
    "h800": GPU("H800 SXM 80 GB", 80e9, 3.35e12, 989e12, 1979e12, 200e9),
    "h20": GPU("H20 96 GB", 96e9, 4.0e12, 148e12, 296e12, 450e9),
    "b200": GPU("B200 180 GB", 180e9, 8.0e12, 2250e12, 4500e12, 900e9, host_memory=4096 * GiB),
}

GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Assumptions:
    """What is not known of a run before it is made: one set for every hardware and layout.

    None of these is fitted to the published rows of the back-test.

    Attributes:
        gemm, attention: share of the peak that matrix products and attention reach in training.
        memory: share of the memory bandwidth that all other operators reach.
        decode_memory: share of the memory bandwidth that decoding reaches.
        links: share of NVLink, NIC and PCIe bandwidth that transfers reach.
        launch_s: of one operator from Python, where the GPU waits for it.
        eager_launches: kernels of one layer of a decoding step without CUDA graphs.
        hop_s, far_hop_s: latency of a collective within a node and between nodes.
        adam_bytes_per_s: of a node's host memory, for the offloaded optimizer.
        framework: bytes of CUDA context, NCCL buffers and the generator's workspace.
        fragmentation: share of trainer's activations lost to the allocator.
        host_process: bytes of host memory of one rank's process.
        imbalance: slowest rank's rows of experts over the mean.
    """

    gemm: float = 0.55
    attention: float = 0.45
    memory: float = 0.7
    decode_memory: float = 0.6
    links: float = 0.7
    launch_s: float = 6e-6
    eager_launches: int = 40
    hop_s: float = 20e-6
    far_hop_s: float = 60e-6
    adam_bytes_per_s: float = 200e9
    framework: float = 5 * GiB
    fragmentation: float = 0.05
    host_process: float = 8 * GiB
    imbalance: float = 1.2

    def lines(self) -> list[str]:
        return [f"{name} = {value:g}" for name, value in asdict(self).items()]


def transfer_s(gpu: GPU, assumed: Assumptions, sent: float, ranks: int, calls: int) -> float:
    """Seconds of collectives in which each rank passes on `sent` bytes among `ranks` ranks.

    Ranks of a group are consecutive: the part of a message for the own node goes over NVLink, the
    rest over the NIC, at the same time.
    """
    near = min(ranks, GPUS_PER_NODE)
    share_far = (ranks - near) / max(1, ranks)
    far = sent * share_far / (gpu.nic * assumed.links)
    here = sent * (near - 1) / max(1, ranks) / (gpu.nvlink * assumed.links)
    hop = assumed.far_hop_s if ranks > near else assumed.hop_s
    return max(far, here) + calls * hop
