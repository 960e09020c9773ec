"""The GPUs that ggml sees."""

from __future__ import annotations

import ctypes
from typing import Any

from homeinfer.cluster.planning.profile import Gpu
from homeinfer.engine import runtime

_GPU, _INTEGRATED = 1, 2
"""GGML_BACKEND_DEVICE_TYPE_GPU and _IGPU; 0 is the CPU, 3 an accelerator beside it (BLAS, AMX) without memory."""


def list_gpus() -> tuple[Gpu, ...]:
    """ggml_backend_dev_get's devices that are GPUs, in its order. Loads drivers, which may end the process."""
    library: Any = runtime.ggml()
    for name, result in (
        ("ggml_backend_dev_count", ctypes.c_size_t),
        ("ggml_backend_dev_get", ctypes.c_void_p),
        ("ggml_backend_dev_name", ctypes.c_char_p),
        ("ggml_backend_dev_description", ctypes.c_char_p),
        ("ggml_backend_dev_type", ctypes.c_int),
        ("ggml_backend_dev_memory", None),
    ):
        function = getattr(library, name)
        function.restype = result
        function.argtypes = (
            () if name.endswith("count") else (ctypes.c_size_t if name.endswith("get") else ctypes.c_void_p,)
        )
    size = ctypes.POINTER(ctypes.c_size_t)
    library.ggml_backend_dev_memory.argtypes = (ctypes.c_void_p, size, size)
    return tuple(
        _gpu(library, device)
        for device in (library.ggml_backend_dev_get(i) for i in range(library.ggml_backend_dev_count()))
        if library.ggml_backend_dev_type(device) in (_GPU, _INTEGRATED)
    )


def _gpu(library: Any, device: int) -> Gpu:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    library.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
    return Gpu(
        name=library.ggml_backend_dev_description(device).decode("utf-8", "replace"),
        backend=library.ggml_backend_dev_name(device).decode("utf-8", "replace"),
        memory_bytes=free.value,
        is_unified=library.ggml_backend_dev_type(device) == _INTEGRATED,
    )
