"""ggml's GPUs, by the numbers that profiles and plans give them."""

from __future__ import annotations

import ctypes
from typing import Any

from homeinfer.engine import runtime
from homeinfer.errors import HomeinferError

GPU, INTEGRATED = 1, 2
"""GGML_BACKEND_DEVICE_TYPE_GPU and _IGPU; 0 is the CPU, 3 an accelerator beside it (BLAS, AMX) without memory."""


def gpu_devices() -> tuple[int, ...]:
    """Each GPU's ggml_backend_dev_t, in ggml's order. Loads drivers, which may end the process."""
    library: Any = runtime.ggml()
    for name, result, arguments in (
        ("ggml_backend_dev_count", ctypes.c_size_t, ()),
        ("ggml_backend_dev_get", ctypes.c_void_p, (ctypes.c_size_t,)),
        ("ggml_backend_dev_type", ctypes.c_int, (ctypes.c_void_p,)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    devices = (library.ggml_backend_dev_get(i) for i in range(library.ggml_backend_dev_count()))
    return tuple(device for device in devices if library.ggml_backend_dev_type(device) in (GPU, INTEGRATED))


def one_gpu(number: int) -> ctypes.Array[ctypes.c_void_p]:
    """llama_model_params.devices with this GPU alone. Raises HomeinferError where there is none of this number."""
    devices = gpu_devices()
    if not 0 <= number < len(devices):
        raise HomeinferError(f"layers are to be on GPU {number}, and this device has {len(devices)}: measure it again")
    return (ctypes.c_void_p * 2)(devices[number], None)
