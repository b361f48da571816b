"""What the GPUs have consumed: NVML's own counter, through the driver's library alone."""

import ctypes
from functools import cache
from typing import Any

JOULES_PER_KWH = 3.6e6
_LIBRARY = "libnvidia-ml.so.1"


def gpu_kwh() -> float | None:
    """Kilowatt-hours that all GPUs of this machine have consumed since their driver was loaded.

    A difference of two readings is what happened between them. None where no GPU tells (there is
    none, or it is older than Volta).
    """
    nvml = _nvml()
    if nvml is None:
        return None
    count = ctypes.c_uint()
    if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return None
    readings = [_millijoules(nvml, index) for index in range(count.value)]
    known = [reading for reading in readings if reading is not None]
    return sum(known) / 1000 / JOULES_PER_KWH if known else None


@cache
def _nvml() -> Any:
    try:
        nvml = ctypes.CDLL(_LIBRARY)
    except OSError:
        return None
    return nvml if nvml.nvmlInit_v2() == 0 else None


def _millijoules(nvml: Any, index: int) -> int | None:
    device, energy = ctypes.c_void_p(), ctypes.c_ulonglong()
    if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)):
        return None
    if nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(energy)):
        return None
    return energy.value
