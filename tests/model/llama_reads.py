"""`python -m tests.model.llama_reads FILE`: counts the headers in FILE that llama.cpp does not read.

FILE holds headers, each after its 64-bit length. A process of its own: llama.cpp aborts on what it
does not expect.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from pathlib import Path

import llama_cpp


class InitParams(ctypes.Structure):
    """struct gguf_init_params"""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.POINTER(ctypes.c_void_p)))


def main(path: Path) -> None:
    ggml = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("*ggml-base*"))))
    ggml.gguf_init_from_buffer.restype = ctypes.c_void_p
    ggml.gguf_init_from_buffer.argtypes = [ctypes.c_char_p, ctypes.c_size_t, InitParams]
    ggml.gguf_free.argtypes = [ctypes.c_void_p]
    ggml.ggml_free.argtypes = [ctypes.c_void_p]
    data = path.read_bytes()
    position = read = refused = 0
    while position < len(data):
        (length,) = struct.unpack_from("<Q", data, position)
        header = data[position + 8 : position + 8 + length]
        position += 8 + length
        context = ctypes.c_void_p()
        found = ggml.gguf_init_from_buffer(header, length, InitParams(True, ctypes.pointer(context)))
        if found:
            read += 1
            ggml.ggml_free(context)
            ggml.gguf_free(found)
        else:
            refused += 1
    print(read, refused)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
