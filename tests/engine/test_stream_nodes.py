"""What native/stream.c sees in a graph node: made up here, with the callback that llama.cpp would call."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from homeinfer import _native
from homeinfer.engine import runtime
from homeinfer.engine.graph_nodes import COMPUTED, GgmlTensor
from homeinfer.engine.streaming import SUPPORTED, check_tensor_layout

PAGE = mmap.PAGESIZE


class Weights(NamedTuple):
    """A page of a file that is streamed to the memory at an address, and the callback for a graph's nodes."""

    file: Path
    memory: mmap.mmap
    address: int
    on_node: Callable[[int, bool, int], bool]
    user: int

    def is_used(self, node: GgmlTensor) -> bool:
        """Whether the graph is to stop after this node."""
        found = self.on_node(ctypes.addressof(node), True, self.user)
        assert self.on_node(ctypes.addressof(node), False, self.user)
        return found


@pytest.fixture
def weights(tmp_path: Path) -> Iterator[Weights]:
    assert SUPPORTED
    check_tensor_layout()
    file = tmp_path / "weights"
    file.write_bytes(np.random.default_rng(0).bytes(2 * PAGE))
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
        function, user = _native.capture_pointers(capture)
        on_node = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)(function)
        yield Weights(file, memory, address, on_node, user)
    finally:
        _native.stream_close(stream)
        os.close(handle)


@pytest.mark.parametrize("place", [0, 2, 9])
def test_weights_are_waited_for_wherever_they_stand_among_the_sources(weights: Weights, place: int) -> None:
    weight, node = GgmlTensor(data=weights.address + 16), GgmlTensor(ne=(1, 1, 1, 1), flags=COMPUTED, name=b"product")
    node.src[place] = ctypes.pointer(weight)
    assert weights.is_used(node)
    assert weights.memory[:PAGE] == weights.file.read_bytes()[PAGE:]


@pytest.mark.parametrize("n", [(0, 1, 1, 1), (7, 0, 1, 1), (7, 1, 1, 0)])
def test_a_product_of_no_rows_needs_no_weights(weights: Weights, n: tuple[int, int, int, int]) -> None:
    weight, node = GgmlTensor(data=weights.address + 16), GgmlTensor(ne=n, flags=COMPUTED, name=b"product")
    node.src[0] = ctypes.pointer(weight)
    assert not weights.is_used(node)


def test_what_llama_cpp_does_not_compute_needs_no_weights(weights: Weights) -> None:
    weight, node = GgmlTensor(data=weights.address + 16), GgmlTensor(ne=(1, 1, 1, 1), name=b"tokens looked up")
    node.src[0] = ctypes.pointer(weight)
    assert not weights.is_used(node)
