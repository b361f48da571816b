"""What accelerators can do: peak arithmetic, memory bandwidth and memory of common devices.

DEVICES is for every machine (MFU, estimates); GPUS has the two that the planner compiles for, in
full. Dense rates, without structured sparsity, of one device as `jax.devices()` lists them.
NVIDIA: the data sheet of each product, half of the figure where a sheet prints only "with
sparsity"; GeForce cards, and the SMs, clocks and L2 of Hopper: the architecture white papers,
bfloat16 with float32 accumulation. AMD: Instinct data sheets. TPU: cloud.google.com/tpu/docs
(system architecture) and jax/_src/tpu_info.py.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One kind of device; `name_pattern` is searched in device_kind without regard to case.

    bf16_tflops and fp8_tflops: 10¹² operations a second (fp8 0: no fp8 units). bandwidth: 10¹²
    bytes a second. memory: GiB as the maker rounds it (driver and ECC keep one to six per cent of
    it).
    """

    name_pattern: str
    bf16_tflops: float
    fp8_tflops: float
    bandwidth: float
    memory: float


DEVICES: tuple[Device, ...] = (  # the first match counts: special names before general ones
    # NVIDIA Blackwell
    Device(r"GB300", 2500, 5000, 8.0, 279),
    Device(r"B300", 2250, 4500, 8.0, 270),
    Device(r"GB200", 2500, 5000, 8.0, 186),
    Device(r"B200", 2250, 4500, 8.0, 180),
    Device(r"B100", 1750, 3500, 8.0, 180),
    Device(r"RTX PRO 6000 Blackwell", 504, 1007, 1.792, 96),
    Device(r"RTX 5090$", 209.5, 419, 1.792, 32),
    Device(r"RTX 5080$", 112.6, 225, 0.96, 16),
    # NVIDIA Hopper
    Device(r"GH200", 989, 1979, 4.0, 96),
    Device(r"H200 NVL", 836, 1671, 4.8, 141),
    Device(r"H200", 989, 1979, 4.8, 141),
    Device(r"H100 NVL", 835, 1671, 3.9, 94),
    Device(r"H100 PCIe", 756, 1513, 2.0, 80),
    Device(r"H[18]00", 989, 1979, 3.35, 80),  # SXM: "H100 80GB HBM3"; H800 differs in NVLink only
    Device(r"\bH20\b", 148, 296, 4.0, 96),
    # NVIDIA Ada
    Device(r"\bL40S\b", 362, 733, 0.864, 48),
    Device(r"\bL40\b", 181, 362, 0.864, 48),
    Device(r"\bL4\b", 121, 242, 0.3, 24),
    Device(r"RTX 6000 Ada", 364, 729, 0.96, 48),
    Device(r"RTX 4090$", 165.2, 330, 1.008, 24),
    Device(r"RTX 4080 SUPER$", 104.4, 209, 0.736, 16),
    Device(r"RTX 4080$", 97.5, 195, 0.717, 16),
    # NVIDIA Ampere
    Device(r"A[18]00.*PCIe.*80GB|A[18]00 80GB PCIe", 312, 0, 1.935, 80),
    Device(r"A[18]00.*80GB", 312, 0, 2.039, 80),
    Device(r"\bA[18]00", 312, 0, 1.555, 40),
    Device(r"\bA40\b", 149.7, 0, 0.696, 48),
    Device(r"\bA30\b", 165, 0, 0.933, 24),
    Device(r"\bA10G\b", 70, 0, 0.6, 24),
    Device(r"\bA10\b", 125, 0, 0.6, 24),
    Device(r"RTX A6000", 154.8, 0, 0.768, 48),
    Device(r"RTX 3090 Ti$", 80, 0, 1.008, 24),
    Device(r"RTX 3090$", 71, 0, 0.936, 24),
    # AMD Instinct; each of the two dies of an MI250X is a device
    Device(r"MI355X", 2516, 5033, 8.0, 288),
    Device(r"MI325X", 1307, 2615, 6.0, 256),
    Device(r"MI300X", 1307, 2615, 5.3, 192),
    Device(r"MI250X?", 191.5, 0, 1.638, 64),
    # Google TPU; a v2, v3 or 7x chip shows its two halves as devices
    Device(r"TPU ?v?7x?\b", 1153, 2307, 3.69, 96),
    Device(r"TPU v6", 918, 0, 1.64, 32),
    Device(r"TPU v5 ?(lite|e)", 197, 0, 0.819, 16),
    Device(r"TPU v5", 459, 0, 2.765, 95),
    Device(r"TPU v4 lite", 138, 0, 0.614, 8),
    Device(r"TPU v4", 275, 0, 1.228, 32),
    Device(r"TPU v3", 61.5, 0, 0.45, 16),
    Device(r"TPU v2", 22.5, 0, 0.35, 8),
)


@dataclass(frozen=True)
class Gpu:
    """A GPU that programs are compiled for: dense FLOP/s, bytes/s, bytes. Defaults: Hopper, SXM."""

    name: str
    memory: int  # as the driver reports it, ECC taken off
    bandwidth: float
    memory_clock_ghz: float
    bf16_flops: float = 989.4e12
    fp8_flops: float = 1978.9e12
    tf32_flops: float = 494.7e12
    link_bandwidth: float = 450e9  # NVLink 4: 18 links of 25 GB/s in each direction
    sms: int = 132
    clock_ghz: float = 1.98  # maximum boost of the SMs
    l2_cache: int = 50 * 2**20


GPUS = {  # by the names that --target takes
    "h100": Gpu("NVIDIA H100 80GB HBM3", 81008 * 2**20, 3352.32e9, 2.619),
    "h200": Gpu("NVIDIA H200 141GB HBM3e", 144384 * 2**20, 4800e9, 3.75),
}


def find_device(device_kind: str) -> Device | None:
    """The table's entry for what JAX calls `device_kind`; None where it has none (a CPU, say)."""
    for device in DEVICES:
        if re.search(device.name_pattern, device_kind.strip(), re.IGNORECASE):
            return device
    return None


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device, the denominator of MFU; None for an unknown device."""
    device = find_device(device_kind)
    return device.bf16_tflops * 1e12 if device else None
