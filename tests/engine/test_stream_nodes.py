"""What native/stream.c sees in a graph node: made up here, with the callback that llama.cpp would call."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from homeinfer import _native
from homeinfer.engine import runtime
from homeinfer.engine.graph_nodes import GgmlTensor
from homeinfer.engine.streaming import SUPPORTED, check_tensor_layout

PAGE = mmap.PAGESIZE


@pytest.mark.parametrize("place", [0, 2, 9])
def test_weights_are_waited_for_wherever_they_stand_among_the_sources(tmp_path: Path, place: int) -> None:
    assert SUPPORTED
    check_tensor_layout()
    file = tmp_path / "weights"
    file.write_bytes(np.random.default_rng(place).bytes(2 * PAGE))
    memory = mmap.mmap(-1, 2 * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    get_name, nbytes, tensor_get = map(runtime.address, ("ggml_get_name", "ggml_nbytes", "ggml_backend_tensor_get"))
    capture = _native.capture_new(get_name, nbytes, tensor_get, "no node")
    stream = _native.stream_new(1 << 20, 1, PAGE)
    handle = os.open(file, os.O_RDONLY)
    try:
        _native.stream_add(stream, handle, 1, False, ((PAGE, address, PAGE, 0),))
        _native.capture_stream(capture, stream)
        _native.stream_start(stream)
        weight, node = GgmlTensor(data=address + 16), GgmlTensor(name=b"product")
        node.src[place] = ctypes.pointer(weight)
        function, user = _native.capture_pointers(capture)
        on_node = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)(function)
        assert on_node(ctypes.addressof(node), True, user)
        assert memory[:PAGE] == file.read_bytes()[PAGE:]
        assert on_node(ctypes.addressof(node), False, user)
    finally:
        _native.stream_close(stream)
        os.close(handle)
