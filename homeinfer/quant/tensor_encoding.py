"""A tensor's bytes from float32 and back, as the loaded ggml has them."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

from homeinfer.engine import runtime
from homeinfer.errors import HomeinferError
from homeinfer.model.ggml_types import TYPE_NUMBERS, TYPE_SIZES
from homeinfer.quant.tensor_types import TARGET_TYPES

Floats = npt.NDArray[np.float32]

_MOST_F16 = 65504.0
_EXACT = ("F32", "F16", "BF16")


def is_exact_type(type_name: str) -> bool:
    """Whether what this type blurs is nothing beside a quantization's error."""
    return type_name in _EXACT


def encode(type_name: str, rows: Floats) -> bytes:
    """Finite weights, float32 [m, n], as a tensor's bytes; quantized by ggml_quantize_chunk, all columns alike.

    Raises HomeinferError for a type that ggml does not write.
    """
    match type_name:
        case "F32":
            return rows.tobytes()
        case "F16":
            return np.clip(rows, -_MOST_F16, _MOST_F16).astype(np.float16).tobytes()
        case "BF16":
            bits = rows.view(np.uint32)
            # to nearest, ties to even
            return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).tobytes()
    if type_name not in TARGET_TYPES:
        raise HomeinferError(f"llama.cpp does not write tensors of type {type_name}; start from the model's F16 file")
    return _quantized(type_name, rows)


def _quantized(type_name: str, rows: Floats) -> bytes:
    quantize = runtime.ggml().ggml_quantize_chunk
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    quantize.argtypes = (ctypes.c_int, pointer, pointer, number, number, number, pointer)
    quantize.restype = ctypes.c_size_t
    m, n = rows.shape
    weights, size = TYPE_SIZES[type_name]
    out = np.empty(m * (n // weights) * size, np.uint8)
    alike = np.ones(n, np.float32)
    quantize(TYPE_NUMBERS[type_name], rows.ctypes.data, out.ctypes.data, 0, m, n, alike.ctypes.data)
    return out.tobytes()


def decode(type_name: str, data: bytes, n_weights: int) -> Floats:
    """A tensor's weights, float32 [n_weights], by ggml's own dequantizer."""
    if type_name == "F32":
        return np.frombuffer(data, np.float32)
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    to_float = function(runtime.to_float_address(TYPE_NUMBERS[type_name]))
    packed, out = np.frombuffer(data, np.uint8), np.empty(n_weights, np.float32)
    to_float(packed.ctypes.data, out.ctypes.data, n_weights)
    return out
