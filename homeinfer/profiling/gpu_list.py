"""The GPUs that ggml sees."""

from __future__ import annotations

import ctypes
from typing import Any

from homeinfer.cluster.planning.profile import Gpu
from homeinfer.engine import runtime
from homeinfer.engine.gpus import INTEGRATED, gpu_devices


def list_gpus() -> tuple[Gpu, ...]:
    """ggml_backend_dev_get's devices that are GPUs, in its order. Loads drivers, which may end the process."""
    library: Any = runtime.ggml()
    for name, result in (
        ("ggml_backend_dev_name", ctypes.c_char_p),
        ("ggml_backend_dev_description", ctypes.c_char_p),
        ("ggml_backend_dev_memory", None),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, (ctypes.c_void_p,)
    size = ctypes.POINTER(ctypes.c_size_t)
    library.ggml_backend_dev_memory.argtypes = (ctypes.c_void_p, size, size)
    return tuple(_gpu(library, device) for device in gpu_devices())


def _gpu(library: Any, device: int) -> Gpu:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    library.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
    return Gpu(
        name=library.ggml_backend_dev_description(device).decode("utf-8", "replace"),
        backend=library.ggml_backend_dev_name(device).decode("utf-8", "replace"),
        memory_bytes=free.value,
        is_unified=library.ggml_backend_dev_type(device) == INTEGRATED,
    )
