"""A run's speed: images and FLOPs per second, share of the GPU's peak, memory. Never waits for a device."""

import math
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from ..config import RATIO_RANGE, ModelConfig
from ..kernels.backends import tf32

GIB, TERA = 2**30, 1e12


class Speed:
    """Computes the speed columns of a row of metrics. Construct once per run: counting FLOPs takes seconds.

    ``dtype``: the dtype of matmuls (``train.dtype``); ``world_size``: the number of processes, each with its
    ``device``.
    """

    def __init__(self, config: ModelConfig, device: torch.device, dtype: str, world_size: int = 1):
        self.device, self.world_size = device, world_size
        self.flops = step_flops(config)
        self.peak = peak_flops(device, dtype)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def of(self, images: int, seconds: float) -> dict[str, float]:
        """The columns for ``images``, over all processes, trained on in ``seconds``.

        ``img_per_s`` covers all processes; ``tflop_per_s`` is per GPU, in FLOPs that the reference needs;
        ``share_of_peak`` (0..1) is its share of the data-sheet peak, absent for unknown GPUs.
        ``memory_gib``: peak memory of tensors on this device since the last call; on a CPU the process's
        peak resident memory.
        """
        img_per_s = images / max(seconds, 1e-9)
        flop_per_s = img_per_s * self.flops / self.world_size
        columns = {"img_per_s": img_per_s, "tflop_per_s": flop_per_s / TERA}
        if self.peak is not None:
            columns["share_of_peak"] = flop_per_s / self.peak
        if (memory := self._peak_memory()) is not None:
            columns["memory_gib"] = memory / GIB
        return columns

    def _peak_memory(self) -> int | None:
        if self.device.type != "cuda":
            return peak_resident_bytes()
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak


@cache
def step_flops(config: ModelConfig) -> float:
    """Matmul FLOPs of one image in one training step, forward and backward, that the reference needs.

    Counted on the meta device. For MDTv2, which draws the number of kept tokens K, this is the mean over the
    draws: FLOPs are quadratic in K, so it is interpolated from three counts.
    """
    from ..models.flops import train_step  # imports Triton

    if config.family == "dit" or config.mask_ratio is None:
        return float(train_step(config, None).flops)
    shares = kept_shares(config)
    lengths = list(shares)
    if len(lengths) <= 3:
        return sum(share * train_step(config, K).flops for K, share in shares.items())
    nodes = (lengths[0], lengths[len(lengths) // 2], lengths[-1])
    counted = {K: train_step(config, K).flops for K in nodes}
    return sum(
        share * counted[node] * _lagrange(K, node, nodes) for K, share in shares.items() for node in nodes
    )


def kept_shares(config: ModelConfig) -> dict[int, float]:
    """Probability that a masked pass keeps K of the L tokens, by K (ascending).

    MDTv2 keeps floor(L (1 - ratio)) with ``ratio`` uniform in [mask_ratio, mask_ratio + RATIO_RANGE); MDT v1
    always keeps the same number.
    """
    if config.mask_ratio is None:
        return {}
    L = config.grid_size**2
    highest = L * (1 - config.mask_ratio)
    if config.family != "mdtv2":
        return {int(highest): 1.0}
    width = L * RATIO_RANGE
    lowest = highest - width
    shares = {
        K: (min(K + 1, highest) - max(K, lowest)) / width
        for K in range(math.floor(lowest), math.floor(highest) + 1)
    }
    return {K: share for K, share in shares.items() if share > 1e-9}  # rounding leaves slivers at the ends


def _lagrange(x: float, node: int, nodes: tuple[int, ...]) -> float:
    """The weight of the value at ``node`` in the interpolating polynomial through all ``nodes``, at ``x``."""
    return math.prod((x - other) / (node - other) for other in nodes if other != node)


@dataclass(frozen=True)
class Peak:
    """Dense TFLOP/s of one GPU with float32 accumulation; None: its tensor cores do not support the type."""

    name: str
    bfloat16: float | None
    float16: float
    tf32: float | None
    float32: float


# The first row whose words all occur in torch.cuda.get_device_name is used. Data-sheet numbers with 2:4
# sparsity are halved. float32 is the rate without tensor cores.
PEAKS = (
    # NVIDIA GB200 NVL72 data sheet: 5 PFLOPS FP16/BF16 and 2.5 TF32 per GPU with sparsity.
    Peak("GB200", 2500.0, 2500.0, 1250.0, 80.0),
    # NVIDIA Blackwell architecture technical brief, HGX B200: 4.5 and 2.2 PFLOPS with sparsity.
    Peak("B200", 2250.0, 2250.0, 1100.0, 75.0),
    # NVIDIA Blackwell architecture technical brief, HGX B100: 3.5 and 1.8 PFLOPS with sparsity.
    Peak("B100", 1750.0, 1750.0, 900.0, 60.0),
    # NVIDIA H200 data sheet, NVL: 1,671 and 835 with sparsity.
    Peak("H200 NVL", 835.5, 835.5, 417.5, 60.0),
    # NVIDIA H200 data sheet, SXM: 1,979 and 989 with sparsity.
    Peak("H200", 989.5, 989.5, 494.5, 67.0),
    # NVIDIA GH200 Grace Hopper Superchip data sheet: 990 and 494 dense.
    Peak("GH200", 990.0, 990.0, 494.0, 67.0),
    # NVIDIA H100 data sheet, NVL: 1,671 and 835 with sparsity.
    Peak("H100 NVL", 835.5, 835.5, 417.5, 60.0),
    # NVIDIA H100 data sheet, PCIe: 1,513 and 756 with sparsity.
    Peak("H100 PCIe", 756.5, 756.5, 378.0, 51.0),
    # NVIDIA H100 data sheet, SXM: 1,979 and 989 with sparsity.
    Peak("H100", 989.5, 989.5, 494.5, 67.0),
    # NVIDIA H800 data sheet, PCIe, then SXM: the H100's but for FP64 and NVLink.
    Peak("H800 PCIe", 756.5, 756.5, 378.0, 51.0),
    Peak("H800", 989.5, 989.5, 494.5, 67.0),
    # NVIDIA A100 data sheet, SXM and PCIe alike: 312 and 156 dense. NVIDIA A800 data sheet: the same.
    Peak("A100", 312.0, 312.0, 156.0, 19.5),
    Peak("A800", 312.0, 312.0, 156.0, 19.5),
    # NVIDIA L40S data sheet: 362.05 and 183 dense.
    Peak("L40S", 362.05, 362.05, 183.0, 91.6),
    # NVIDIA L4 data sheet: 242 and 120 with sparsity.
    Peak("L4", 121.0, 121.0, 60.0, 30.3),
    # NVIDIA A40 data sheet: 149.7 and 74.8 dense.
    Peak("A40", 149.7, 149.7, 74.8, 37.4),
    # NVIDIA A10 data sheet: 125 and 62.5 dense.
    Peak("A10", 125.0, 125.0, 62.5, 31.2),
    # NVIDIA Ampere GA102 GPU architecture whitepaper, RTX A6000: 154.8 and 77.4 dense.
    Peak("RTX A6000", 154.8, 154.8, 77.4, 38.7),
    # NVIDIA RTX Blackwell GPU architecture whitepaper, GeForce RTX 5090, FP32 accumulate: 209.5 and 104.8.
    Peak("RTX 5090", 209.5, 209.5, 104.8, 104.8),
    # NVIDIA Ada GPU architecture whitepaper, GeForce RTX 4090, FP32 accumulate: 165.2 and 82.6.
    Peak("RTX 4090", 165.2, 165.2, 82.6, 82.6),
    # NVIDIA Ampere GA102 GPU architecture whitepaper, GeForce RTX 3090, FP32 accumulate: 71 and 35.6.
    Peak("RTX 3090", 71.0, 71.0, 35.6, 35.6),
    # NVIDIA V100 data sheet: V100S PCIe 130, SXM2 125, PCIe 112.
    Peak("V100S", None, 130.0, None, 16.4),
    Peak("V100 SXM2", None, 125.0, None, 15.7),
    Peak("V100 SXM3", None, 125.0, None, 15.7),
    Peak("V100 PCIE", None, 112.0, None, 14.0),
    # NVIDIA T4 data sheet: 65.
    Peak("T4", None, 65.0, None, 8.1),
)
OTHER_CHIPS = {"laptop", "max", "mig", "d", "ti"}
"""Words that mark a different chip, or part of one: a laptop's, Max-Q, a MIG slice, RTX 4090 D."""


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Data-sheet FLOP/s of ``device`` for dense matmuls in ``dtype`` (``bfloat16``, ``float16`` or
    ``float32``); None for a CPU and for GPUs not in the table.

    float32 means TF32 where torch may use it (``torch.set_float32_matmul_precision``).
    """
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    taken = "tf32" if dtype == "float32" and tf32() else dtype
    return peak_of(torch.cuda.get_device_name(device), taken)


def peak_of(name: str, dtype: str) -> float | None:
    """The same by the GPU's ``name``; ``dtype`` may also be ``tf32`` (float32's rate if not supported)."""
    words = set(re.findall(r"[a-z0-9.]+", name.lower()))
    if words & OTHER_CHIPS:
        return None
    for row in PEAKS:
        if words >= set(row.name.lower().split()):
            peak = getattr(row, dtype, None)
            if dtype == "tf32" and peak is None:
                peak = row.float32
            return None if peak is None else peak * TERA
    return None


def peak_resident_bytes() -> int | None:
    """Peak resident memory of this process; None if the system does not report it."""
    try:  # Linux: getrusage would include the parent's memory from before it started this program
        status = Path("/proc/self/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024
    except (OSError, IndexError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
