"""A mesh of GPUs that are not here, to compile for.

XLA compiles for a GPU that is only described to it: the CUDA wheels hold the whole compiler, and a
target description (a text protobuf, stream_executor/device_description.proto) stands in for the
device. It is made here from the data sheet (devices.py) and the CUDA programming guide's table of
compute capability 9.0 (threads, registers, shared memory).
"""

from importlib.util import find_spec

from jax.experimental import topologies
from jax.sharding import Mesh

from nanochat_jax.devices import GPUS, Gpu
from nanochat_jax.sharding import make_mesh

KIB, GIB = 2**10, 2**30
GPUS_PER_NODE = 8

# Without a device nothing can be timed, so nothing is tuned: plain cuBLASLt products, default
# fusions.
COMPILER_OPTIONS: dict[str, bool | int | str] = {
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_experimental_enable_fusion_autotuner": False,
}


def target_config(gpu: Gpu) -> str:
    """The description of a Hopper GPU that XLA's deviceless compilation reads."""
    khz = f"{gpu.clock_ghz * 1e6:.0f}KHz clock, {gpu.memory_clock_ghz * 1e6:.0f}KHz mem clock"
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: {48 * KIB}
  shared_memory_per_block_optin: {227 * KIB}
  shared_memory_per_core: {228 * KIB}
  core_count: {gpu.sms}
  fpus_per_core: 128
  clock_rate_ghz: {gpu.clock_ghz}
  l2_cache_size: {gpu.l2_cache}
  memory_bandwidth: {gpu.bandwidth:.0f}
  device_memory_size: {gpu.memory}
  device_address_bits: 64
  ecc_enabled: true
  pcie_bandwidth: {32 * GIB}
  cuda_compute_capability {{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }}
  device_vendor: "NVIDIA Corporation"
  name: "{gpu.name}"
  platform_version: "Compute Capability 9.0a"
  model_str: "sm_9.0a with {gpu.memory}B RAM, {gpu.sms} cores, {khz}, {gpu.l2_cache}B L2$"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.28.0"
  device_interconnect_info {{ active_links: 18 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 28 patch: 0 }}
device_description_str: "{gpu.name}"
"""


def deviceless_mesh(target: str, n_devices: int) -> Mesh:
    """A mesh of GPUs that need not exist, eight to a node: a program can be compiled for it.

    ValueError for an unknown target, and, naming what to install, when the compiler is absent.
    """
    gpu = find_gpu(target)
    if not any(find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        raise ValueError(
            "compiling for a GPU needs the CUDA wheels (4.5 GB, no GPU): install the extra cuda13, "
            "pip install '.[cuda13]'; or plan by arithmetic alone with --no-compile"
        )
    nodes = -(-n_devices // GPUS_PER_NODE)
    description = topologies.get_topology_desc(
        platform="cuda",
        target_config=target_config(gpu),
        topology=f"1x{nodes}x{n_devices // nodes}",
    )
    return make_mesh(devices=description.devices)


def described(name: str) -> str | None:
    """The key in GPUS of a device by its full name, such as the driver gives it."""
    return next((key for key in GPUS if key in name.lower().split()), None)


def find_gpu(target: str) -> Gpu:
    if target not in GPUS:
        raise ValueError(f"no description of the GPU {target!r}; there are {', '.join(GPUS)}")
    return GPUS[target]
