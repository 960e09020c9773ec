"""Streamed windows compute what mapped ones do, within their buffer, reading ahead; what goes wrong is said."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

from homeinfer.engine import stream_file, streaming
from homeinfer.engine.edits import Remove
from homeinfer.engine.pipeline import Batch, Flags, Floats, Ints
from homeinfer.engine.streaming import Streamer, least_buffer, stream_groups
from homeinfer.engine.window import LayerWindow
from homeinfer.engine.window_spec import WindowSpec
from homeinfer.errors import HomeinferError
from homeinfer.model import output_blocks
from homeinfer.model.header import Header, read_header
from tests.support.tiny_models import make_tiny_models
from tests.support.windows import allowed_cuts, forward, windows_of

CUTS = (8, 20)
ROOM = 18 << 20
"""Holds two blocks of the output matrix of 30 MB and little else, of 97 MB that are streamed."""
SLACK = 1 << 20
"""Pages of the file itself that are mapped beside what is streamed."""
TINY = ("qwen3moe", "jamba", "deepseek2", "gemma3", "falcon-h1")

Opened = tuple[Streamer, list[LayerWindow]]
Open = Callable[..., Opened]


@pytest.fixture(scope="module")
def specs(smollm2_path: Path, windows_folder: Path) -> list[WindowSpec]:
    """SmolLM2 in three windows."""
    return specs_of(read_header(smollm2_path), CUTS, windows_folder)


@pytest.fixture(scope="module")
def expected(specs: list[WindowSpec]) -> Floats:
    """The logits of mapped windows."""
    windows = [LayerWindow(spec) for spec in specs]
    rows = answers(windows)
    for window in windows:
        window.close()
    return rows


@pytest.fixture
def opened() -> Iterator[Open]:
    """Makes streamed windows, and closes them at the end."""
    made: list[LayerWindow] = []

    def make(specs: Sequence[WindowSpec], buffer_bytes: int, start: bool = True) -> Opened:
        streamer = Streamer(buffer_bytes)
        made.extend(windows := [LayerWindow(spec, streamer=streamer) for spec in specs])
        if start:
            streamer.start()
        return streamer, windows

    yield make
    for window in made:
        window.close()


def specs_of(header: Header, cuts: Sequence[int], folder: Path) -> list[WindowSpec]:
    windows = windows_of(header, cuts, folder, resident=False, n_seq=2)
    for window in windows:
        window.close()
    return [window.spec for window in windows]


def answers(windows: Sequence[LayerWindow], n_vocab: int = 10_000) -> Floats:
    """Logits after a prefill in two chunks, of a batch of two sequences, and of some decode steps."""
    tokens = np.random.default_rng(3).integers(0, n_vocab, 60).tolist()
    first, second = Batch.of(tokens[39:40], 39), Batch.of(tokens[45:46], 5, 1)
    both = Batch(*(np.concatenate([getattr(first, f), getattr(second, f)]) for f in Batch.__struct_fields__))
    for chunk in (Batch.of(tokens[:20], 0, last_only=False), Batch.of(tokens[20:39], 20, last_only=False)):
        assert forward(windows, chunk).size == 0
    rows = [forward(windows, Batch.of(tokens[40:45], 0, 1)), forward(windows, both)]
    rows += [forward(windows, Batch.of([t], 40 + i)) for i, t in enumerate(tokens[50:])]
    return np.concatenate(rows)


def resident(streamer: Streamer) -> int:
    """Bytes of the windows' places that are in memory, or were swapped out, as the kernel counts them."""
    total, inside = 0, False
    with Path("/proc/self/smaps").open() as lines:
        for line in lines:
            first, _, rest = line.partition(" ")
            if "-" in first and not first.endswith(":"):
                address = int(first.split("-")[0], 16)
                inside = any(m.address <= address < m.address + m.size for m in streamer.mappings)
            elif inside and line.startswith(("Rss:", "Swap:")):
                total += int(rest.split()[0]) << 10
    return total


def until(condition: Callable[[], bool]) -> bool:
    """Whether it comes true within a minute."""
    end = time.monotonic() + 60
    while not (is_true := condition()) and time.monotonic() < end:
        time.sleep(0.005)
    return is_true


def test_streaming_changes_no_bit_and_stays_within_its_buffer(
    specs: list[WindowSpec], expected: Floats, opened: Open
) -> None:
    streamer, windows = opened(specs, ROOM)
    for _ in range(2):
        for window in windows:
            window.edit([Remove(0), Remove(1)])
        assert np.array_equal(answers(windows), expected)
    counts = streamer.counts()
    assert counts.held_bytes <= counts.most_bytes <= ROOM
    assert until(lambda: resident(streamer) <= ROOM + SLACK)
    assert counts.read_bytes > 20 * (streamer.streamed_bytes - ROOM)


def test_what_fits_is_read_once(specs: list[WindowSpec], expected: Floats, opened: Open) -> None:
    streamer, windows = opened(specs, 100 << 20)
    assert np.array_equal(answers(windows), expected)
    counts = streamer.counts()
    assert counts.read_bytes == counts.held_bytes == streamer.streamed_bytes


def test_a_whole_model_is_streamed_though_its_tensors_share_pages(
    smollm2_path: Path, windows_folder: Path, expected: Floats, opened: Open
) -> None:
    streamer, windows = opened(specs_of(read_header(smollm2_path), (), windows_folder), 8 << 20)
    assert np.array_equal(answers(windows), expected)
    assert streamer.counts().most_bytes <= 8 << 20


def test_resident_and_streamed_windows_mix(specs: list[WindowSpec], expected: Floats, opened: Open) -> None:
    mixed = [msgspec.structs.replace(spec, resident=i == 0) for i, spec in enumerate(specs)]
    streamer, windows = opened(mixed, ROOM)
    assert len(streamer.mappings) == 2
    # a resident window sums in another order
    assert np.abs(answers(windows) - expected).max() < 0.5


def test_loading_reads_no_weights(specs: list[WindowSpec], opened: Open) -> None:
    streamer, _ = opened(specs, ROOM, start=False)
    assert resident(streamer) < SLACK
    assert streamer.counts() == streaming.StreamCounts(0, 0, 0.0, 0, 0)


def reads_nothing(streamer: streaming.Streamer) -> bool:
    """Whether all that is to be read ahead seems to have come, and not only its room been taken."""
    before = streamer.counts().read_bytes
    time.sleep(0.3)
    return streamer.counts().read_bytes == before


def test_it_reads_ahead_before_and_between_steps(specs: list[WindowSpec], opened: Open) -> None:
    streamer, windows = opened(specs[:2], 24 << 20)
    almost = (24 << 20) - (1 << 20)
    assert streamer.streamed_bytes > 40 << 20
    assert until(lambda: streamer.counts().held_bytes > almost)
    waits: list[int] = []
    while len(waits) < 3 or (
        min(waits[1:]) >= 10 and len(waits) < 30
    ):  # a disk that stalled has only seemed to be done
        assert until(lambda: resident(streamer) > almost and reads_nothing(streamer))
        before = streamer.counts()
        rows, positions, sequences, wanted = step(len(waits))
        hidden = windows[0].forward(rows, positions, sequences, wanted)
        waits.append(streamer.counts().waits - before.waits)
        windows[1].forward(hidden, positions, sequences, wanted)
        assert streamer.counts().read_bytes > before.read_bytes
    assert min(waits[1:]) < 10  # of its 56 tensors


def test_a_larger_buffer_reads_less(specs: list[WindowSpec], opened: Open) -> None:
    """At most what is streamed for each token, much less where the buffer holds nearly all, nothing where it does."""
    streamer, (window,) = opened(specs[:1], 30 << 20)
    total, steps, position = streamer.streamed_bytes, 6, 0
    least = streamer.least_bytes
    sweep = [least, (least + total) // 2, total - 4096, total]
    shares = []
    for buffer in sweep:
        streamer.resize(buffer)
        before = 0
        for k in range(3 + steps):
            if k == 3:
                before = streamer.counts().read_bytes
            window.forward(*step(position))
            position += 1
            time.sleep(0.02)
        counts = streamer.counts()
        assert counts.held_bytes <= buffer
        shares.append((counts.read_bytes - before) / (steps * total))
    assert shares[0] <= 1 + least / (steps * total)
    assert shares[1] <= 1
    assert shares[2] < 0.75
    assert shares[3] == 0


def test_small_tensors_outside_the_layers_are_streamed_only_where_they_are_used(specs: list[WindowSpec]) -> None:
    """Or a window takes more than its layers, and a buffer as large as they are is too small."""
    for spec, is_last in zip(specs, (False, False, True), strict=True):
        header = read_header(spec.path)
        layers = sum(tensor.nbytes for tensor in header.tensors if tensor.name.startswith("blk."))
        streamed = sum(group.nbytes for group in stream_groups(header, False, is_last))
        assert (streamed - layers > 1 << 20) == is_last
        if not is_last:
            assert streamed - layers <= 4096 * len(header.tensors)


def test_a_lower_limit_frees_memory_at_once(specs: list[WindowSpec], opened: Open) -> None:
    streamer, windows = opened(specs[:2], 30 << 20)
    assert until(lambda: streamer.counts().held_bytes > 28 << 20)
    streamer.resize(10 << 20)
    assert until(lambda: streamer.counts().held_bytes <= 10 << 20)
    assert until(lambda: resident(streamer) <= (10 << 20) + SLACK)
    assert np.isfinite(windows[0].forward(*step())).all()
    with pytest.raises(HomeinferError, match="streamed layers, which need"):
        streamer.resize(4096)


def step(position: int = 0) -> tuple[Ints, Ints, Ints, Flags]:
    return np.array([5], np.int32), np.array([position], np.int32), np.zeros(1, np.int32), np.ones(1, np.bool_)


def test_a_file_that_was_cut_short_is_reported(specs: list[WindowSpec], opened: Open, tmp_path: Path) -> None:
    copy = tmp_path / "window.gguf"
    shutil.copy(specs[0].path, copy)
    streamer, (window,) = opened([msgspec.structs.replace(specs[0], path=str(copy))], ROOM, start=False)
    with copy.open("r+b") as file:
        file.truncate(copy.stat().st_size // 2)
    streamer.start()
    for _ in range(2):
        with pytest.raises(HomeinferError, match=r"window\.gguf: weights can't be read: it has become shorter"):
            window.forward(*step())


def test_closing_ends_reading_and_waiting(specs: list[WindowSpec], opened: Open) -> None:
    streamer, windows = opened(specs, ROOM)
    said: list[str] = []

    def compute() -> None:
        try:
            while True:
                for window in windows:
                    window.edit([Remove(0), Remove(1)])
                answers(windows)
        except HomeinferError as problem:
            said.append(str(problem))

    thread = threading.Thread(target=compute, daemon=True)
    thread.start()
    assert until(lambda: streamer.counts().waits > 0)
    streamer.close()
    thread.join(60)
    assert not thread.is_alive()
    assert said == ["streamed layers are used, but nobody reads them: start the streamer first"]


def test_a_streamer_that_was_not_started_does_not_hang(specs: list[WindowSpec], opened: Open) -> None:
    _, windows = opened(specs, ROOM, start=False)
    with pytest.raises(HomeinferError, match="start the streamer first"):
        windows[0].forward(*step())


def test_a_buffer_too_small_is_refused(specs: list[WindowSpec], opened: Open) -> None:
    with pytest.raises(HomeinferError, match="a buffer of 0 bytes"):
        Streamer(0)
    with pytest.raises(
        HomeinferError, match=r"a buffer of 16\.0 MB for streamed layers, which need 16\.\d MB at least"
    ):
        opened(specs, 16_000_000)


@pytest.mark.parametrize("page", [16 << 10, 64 << 10])
def test_on_machines_with_larger_pages_the_output_matrix_is_used_in_blocks_too(
    specs: list[WindowSpec], expected: Floats, opened: Open, monkeypatch: pytest.MonkeyPatch, page: int
) -> None:
    monkeypatch.setattr(stream_file, "PAGE", page)
    header = read_header(specs[-1].path)
    spans = [span for group in stream_groups(header, False, True) for span in group.spans]
    assert all(span.begin % page == span.end % page == 0 for span in spans)
    assert any(span.lead for span in spans)
    streamer, windows = opened(specs, ROOM)
    assert streamer.output is not None
    assert np.array_equal(answers(windows), expected)
    counts = streamer.counts()
    assert counts.most_bytes <= ROOM
    assert counts.read_bytes > 10 * (streamer.streamed_bytes - ROOM)


@pytest.mark.parametrize("rows", [16, 32])
def test_an_output_matrix_of_its_own_is_used_in_blocks_wherever_that_is_allowed(
    tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """In the models' own files too, where blocks of 16 rows, a page's bytes, hold no page of their own."""
    monkeypatch.setattr(output_blocks, "BLOCK_BYTES", 256 * rows)
    monkeypatch.setattr(streaming, "SMALL", 0)
    assert not make_tiny_models(tmp_path, ("llama", "qwen2", "qwen3"))
    for name, in_blocks in (("llama", True), ("qwen2", False), ("qwen3", True)):  # this qwen2 has a bias there
        header = read_header(tmp_path / f"{name}.gguf")
        assert header.tensor("output.weight") is not None
        for cuts in (max(allowed_cuts(header), key=len), ()):
            specs = specs_of(header, cuts, tmp_path)
            mapped = [LayerWindow(spec) for spec in specs]
            expected = answers(mapped, mapped[-1].n_vocab)
            for window in mapped:
                window.close()
            streamer, windows = opened(specs, ROOM)
            assert (streamer.output is not None and streamer.output.block_rows == rows) == in_blocks
            assert np.array_equal(answers(windows, windows[-1].n_vocab), expected), (name, cuts)


def test_any_architecture_is_streamed_tensor_by_tensor(
    tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those without a node named l_out, mixtures, and those that use a layer's weights out of order."""
    monkeypatch.setattr(streaming, "SMALL", 0)
    problems = make_tiny_models(tmp_path, TINY)
    assert not problems
    for name in TINY:
        header = read_header(tmp_path / f"{name}.gguf")
        specs = specs_of(header, max(allowed_cuts(header), key=len), tmp_path)
        mapped = [LayerWindow(spec) for spec in specs]
        n_vocab = mapped[-1].n_vocab
        expected = answers(mapped, n_vocab)
        for window in mapped:
            window.close()
        files = [read_header(spec.path) for spec in specs]
        buffer = least_buffer([stream_groups(f, False, i == len(files) - 1) for i, f in enumerate(files)]) + 8192
        streamer, windows = opened(specs, buffer)
        assert np.array_equal(answers(windows, n_vocab), expected), name
        counts = streamer.counts()
        assert counts.most_bytes <= buffer < streamer.streamed_bytes < counts.read_bytes, name
