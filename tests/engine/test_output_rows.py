"""A streamed output matrix is used in blocks of rows where that gives the same numbers, and only there."""

from __future__ import annotations

import itertools
from pathlib import Path

import msgspec
import pytest

from homeinfer.cluster.planning.memory import MemoryModel
from homeinfer.cluster.planning.model_shape import model_shape
from homeinfer.cluster.planning.plan import Window, Workload
from homeinfer.cluster.planning.problem import Problem
from homeinfer.engine import stream_file
from homeinfer.engine.streaming import Span, least_buffer, stream_groups
from homeinfer.model.header import Header, MetaValue, TensorInfo, ValueType, read_header
from homeinfer.model.output_blocks import BLOCK_BYTES, PAGE, block_bytes, block_rows, output_matrix
from homeinfer.model.window_file import cut_windows
from tests.support.profiles import Machine, device_of

PAGES = (4 << 10, 16 << 10, 64 << 10)
"""What machines have: most, Raspberry Pi 5 and Asahi Linux, some others of ARM's."""


def test_blocks_are_whole_rows_in_whole_pages(smollm2_path: Path) -> None:
    header = read_header(smollm2_path)
    matrix = output_matrix(header)
    assert matrix is not None
    rows = block_rows(header)
    assert 0 < rows < matrix.shape[1]
    assert block_bytes(header) == rows * matrix.nbytes // matrix.shape[1] <= BLOCK_BYTES
    assert block_bytes(header) % PAGE == 0


def test_a_window_file_streams_all_of_its_output_matrix_in_such_blocks(
    smollm2_path: Path, windows_folder: Path
) -> None:
    model = read_header(smollm2_path)
    header = read_header(cut_windows(model, ((0, 29), (29, 30)), windows_folder)[1])
    matrix = header.tensor("token_embd.weight")
    assert matrix is not None
    inside = [span for span in spans(header) if matrix.offset <= span.begin < matrix.offset + matrix.nbytes]
    assert [span.nbytes for span in inside[:-1]] == [block_bytes(model)] * (len(inside) - 1)
    assert len(inside) > 2
    assert inside[0].begin == matrix.offset
    assert all(a.end == b.begin for a, b in itertools.pairwise(inside))
    assert inside[-1].end >= matrix.offset + matrix.nbytes


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("moved", [0, 32])
def test_only_pages_that_blocks_share_stay_in_the_file(
    smollm2_path: Path, windows_folder: Path, monkeypatch: pytest.MonkeyPatch, page: int, moved: int
) -> None:
    monkeypatch.setattr(stream_file, "PAGE", page)
    model = read_header(smollm2_path)
    header = read_header(cut_windows(model, ((0, 29), (29, 30)), windows_folder)[1])
    tensors = tuple(
        msgspec.structs.replace(t, offset=t.offset + moved) if t.name == "token_embd.weight" else t
        for t in header.tensors
    )
    matrix = next(tensor for tensor in tensors if tensor.name == "token_embd.weight")
    end, step = matrix.offset + matrix.nbytes, block_bytes(model)
    found = spans(msgspec.structs.replace(header, tensors=tensors))
    inside = sorted((span for span in found if span.begin < end and span.end > matrix.offset), key=lambda s: s.begin)
    starts = range(matrix.offset, end, step)
    assert len(inside) == len(starts) > 2
    for span, start in zip(inside, starts, strict=True):
        assert span.begin % page == span.end % page == 0
        assert span.lead == max(0, span.begin - start) < page
        assert start - page < span.begin
        assert min(start + step, end) - page < span.end
    assert all(a.end <= b.begin for a, b in itertools.pairwise(sorted(found, key=lambda span: span.begin)))
    # what is let go with a block holds nothing of the next
    assert all(span.end <= start for span, start in zip(inside, starts[1:], strict=False))


@pytest.mark.parametrize(
    ("architecture", "more"),
    [
        ("gemma3", ()),
        ("command-r", ()),
        ("llama", ("output.bias",)),
        ("llama", ("short",)),
        ("llama", ("scaled",)),
    ],
)
def test_where_more_than_a_product_makes_the_logits_it_is_used_as_a_whole(
    smollm2_path: Path, architecture: str, more: tuple[str, ...]
) -> None:
    header = read_header(smollm2_path, vocabulary=False)
    said = {**header.metadata, "general.architecture": MetaValue(ValueType.STRING, architecture)}
    tensors = header.tensors
    if more == ("scaled",):
        said["llama.logit_scale"] = MetaValue(ValueType.FLOAT32, 0.5)
    elif more == ("short",):
        tensors = tuple(t if t.name != "token_embd.weight" else short(t) for t in tensors)
    elif more:
        tensors = (*tensors, TensorInfo(more[0], (49152,), "F32", 0, 4 * 49152, 0))
    assert block_rows(msgspec.structs.replace(header, metadata=said, tensors=tensors)) == 0
    assert block_rows(header) > 0


def short(tensor: TensorInfo) -> TensorInfo:
    """With so few rows that blocks would save nothing."""
    return msgspec.structs.replace(tensor, shape=(tensor.shape[0], 512), nbytes=tensor.nbytes // tensor.shape[1] * 512)


@pytest.mark.parametrize("page", PAGES)
def test_what_a_plan_leaves_for_streaming_is_enough_for_the_engine(
    smollm2_path: Path, windows_folder: Path, monkeypatch: pytest.MonkeyPatch, page: int
) -> None:
    monkeypatch.setattr(stream_file, "PAGE", page)
    model = read_header(smollm2_path)
    shape = model_shape(model, Workload())
    problem = Problem(shape, (device_of(Machine("d", 8 << 30, 1e10, 1e11, 1e9), shape),), Workload())
    room = MemoryModel(problem).room
    for edges in (((0, 1), (1, 30)), ((0, 29), (29, 30))):
        for (first, last), path in zip(edges, cut_windows(model, edges, windows_folder), strict=True):
            groups = stream_groups(read_header(path), takes_tokens=False, is_last=last == 30)
            assert max(room(layer) for layer in range(first, last + (last == 30))) >= least_buffer([groups])


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("is_tied", [True, False])
def test_it_is_enough_for_a_models_own_file_too(
    smollm2_path: Path, monkeypatch: pytest.MonkeyPatch, page: int, is_tied: bool
) -> None:
    monkeypatch.setattr(stream_file, "PAGE", page)
    model = read_header(smollm2_path)
    matrix = output_matrix(model)
    assert matrix is not None
    if not is_tied:
        file = model.files[0]
        own = msgspec.structs.replace(matrix, name="output.weight", offset=file.size)
        longer = (msgspec.structs.replace(file, size=file.size + own.nbytes),)
        model = msgspec.structs.replace(model, tensors=(*model.tensors, own), files=longer)
    shape = model_shape(model, Workload())
    device = device_of(Machine("d", 8 << 30, 1e10, 1e11, 1e9), shape)
    windows = (Window("d", 0, 30, "s" * 30),)
    fixed = MemoryModel(Problem(shape, (device,), Workload())).of_device(device, windows).fixed
    groups = stream_groups(model, takes_tokens=True, is_last=True)
    too_small = msgspec.structs.replace(device, memory_bytes=fixed + least_buffer([groups]) - 1)
    plain = Workload(headroom=0.0)
    assert MemoryModel(Problem(shape, (too_small,), plain)).of_device(too_small, windows).trouble is not None
    assert least_buffer([groups]) < matrix.nbytes


def spans(header: Header) -> list[Span]:
    return [span for group in stream_groups(header, takes_tokens=False, is_last=True) for span in group.spans]
