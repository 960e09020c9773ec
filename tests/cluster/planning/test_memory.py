"""What a ring takes of each device's memory."""

from __future__ import annotations

import msgspec

from homeinfer.cluster.planning.memory import PAGES, MemoryModel, small_bytes
from homeinfer.cluster.planning.plan import Ring, Window, Workload
from homeinfer.cluster.planning.problem import Problem
from homeinfer.cluster.planning.simulate import Simulator
from tests.cluster.planning.clusters import MB, a_device, a_ring, a_shape

_PLAIN = Workload(n_ctx=256, prompt_tokens=16, n_batch=1, headroom=0.0)
_HIDDEN = 2 * 4 * 1000


def _needed(places: str, memory: int = 8000 * MB, workload: Workload = _PLAIN, kv_bytes: int = 0) -> tuple[int, int]:
    device = a_device("head", memory)
    model = MemoryModel(Problem(a_shape(len(places), kv_bytes=kv_bytes), (device,), workload))
    found = model.of_device(device, a_ring(("head", places)).windows)
    assert found.trouble is None
    return found.fixed, found.buffer


def test_resident_layers_output_and_scratch_count() -> None:
    assert _needed("rrr") == (300 * MB + 50 * MB + 10 * MB + 5 * MB + _HIDDEN, 0)


def test_each_run_has_a_compute_buffer_of_its_own() -> None:
    whole, split = _needed("rrrrr")[0], _needed("rrsrr")[0]
    assert split == whole - 100 * MB + 2 * 10 * MB


def test_what_is_left_is_the_buffer_of_streamed_layers() -> None:
    fixed, buffer = _needed("rsr", 1000 * MB)
    assert fixed + buffer == 1000 * MB


def test_a_last_run_that_is_streamed_streams_the_output_matrix_too() -> None:
    assert _needed("rrs")[0] == _needed("rrr")[0] + 10 * MB - 100 * MB - 50 * MB


def test_every_layers_cache_is_kept_whatever_its_place() -> None:
    cells = 2048  # 4 x 500, rounded up to a multiple of 256
    long = Workload(n_ctx=500, sequences=4, prompt_tokens=16, n_batch=1, headroom=0.0)
    for places in ("rrr", "rsr"):
        fixed = _needed(places, workload=long, kv_bytes=1000)[0]
        assert fixed - _needed(places)[0] == 3 * 1000 * cells


def test_headroom_is_left_free() -> None:
    shape = a_shape(3)
    need = _needed("rrr")[0]
    for memory, fits in ((need, False), (round(need / 0.9) + 1, True)):
        devices = (a_device("head", memory),)
        simulator = Simulator(Problem(shape, devices, Workload(n_ctx=256, n_batch=1, prompt_tokens=16, headroom=0.1)))
        assert (simulator.trouble(a_ring(("head", "rrr"))) is None) == fits


def test_a_buffer_smaller_than_a_layer_is_named() -> None:
    shape = a_shape(3)
    least = 100 * MB + PAGES + small_bytes(3, shape.hidden_bytes)
    needed = _needed("rsr")[0] + least
    for memory, fits in ((needed - 1, False), (needed, True)):
        simulator = Simulator(Problem(shape, (a_device("head", memory),), _PLAIN))
        trouble = simulator.trouble(a_ring(("head", "rsr")))
        assert (trouble is None) == fits
        assert fits or "head would need" in str(trouble)


def test_a_streamed_output_matrix_needs_room_for_what_of_it_is_used_at_once() -> None:
    layers = tuple(msgspec.structs.replace(layer, largest_bytes=10 * MB) for layer in a_shape(3).layers)
    shape = msgspec.structs.replace(a_shape(3), layers=layers)
    device = a_device("head")
    for block, room in ((0, 50 * MB + PAGES + 10 * MB), (8 * MB, 18 * MB), (20 * MB, 40 * MB)):
        blocks = msgspec.structs.replace(shape, output_block_bytes=block)
        assert MemoryModel(Problem(blocks, (device,), _PLAIN)).room(3) == room + small_bytes(3, shape.hidden_bytes)
    whole = (Window("head", 0, 3, "sss"),)
    blocks = msgspec.structs.replace(shape, output_block_bytes=8 * MB)
    fixed = MemoryModel(Problem(blocks, (device,), _PLAIN)).of_device(device, whole).fixed
    untied = msgspec.structs.replace(blocks, is_tied=False)
    for own, room in ((blocks, 60 * MB), (untied, 20 * MB)):  # the model's own file, not a window file
        for memory, fits in ((fixed + room - MB, False), (fixed + room + MB, True)):
            small = a_device("head", memory)
            assert (MemoryModel(Problem(own, (small,), _PLAIN)).of_device(small, whole).trouble is None) == fits


def test_gpu_layers_take_the_gpus_memory() -> None:
    device = a_device("head", 300 * MB, gpu_ms=0.2, gpu_bytes=350 * MB)
    simulator = Simulator(Problem(a_shape(4), (device,), _PLAIN))
    assert simulator.trouble(a_ring(("head", "grrr"))) is not None
    assert simulator.trouble(a_ring(("head", "ggrr"))) is None
    assert simulator.trouble(a_ring(("head", "rggg"))) is not None
    assert "no GPU 1" in str(simulator.trouble(Ring((Window("head", 0, 4, "gggg", gpu=1),))))
    load = Simulator(Problem(a_shape(2), (device,), _PLAIN)).predict(a_ring(("head", "gg"))).loads[0]
    assert load.gpu_bytes == (265 * MB,)
    assert load.memory_bytes == _HIDDEN


def test_memory_taken_and_free_are_the_profiles() -> None:
    shape, devices = a_shape(6), (a_device("head", 600 * MB), a_device("other"))
    loads = Simulator(Problem(shape, devices, _PLAIN)).predict(a_ring(("head", "rrsssr"))).loads
    assert [load.memory_bytes + load.memory_free_bytes for load in loads] == [600 * MB, 8000 * MB]
    assert loads[0].stream_buffer_bytes > 0
    assert loads[1].memory_bytes == 0
