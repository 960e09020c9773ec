from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homeinfer.errors import HomeinferError
from homeinfer.model.header import read_header
from homeinfer.quant.calibrate import calibrate
from homeinfer.quant.imatrix import (
    Entry,
    Imatrix,
    check_matches,
    from_observed,
    prepared,
    read_imatrix,
    unreached,
    unreached_notes,
    write_imatrix,
)
from homeinfer.quant.observe import Mode, observable, observe
from tests.quant.f16_model import EMBD, FFN, write_f16_model
from tests.support.tiny_models import make_tiny_model


def entry(*rows: list[float], counts: list[float]) -> Entry:
    return Entry(np.array(rows, np.float32), np.array(counts, np.float32))


def sample() -> Imatrix:
    return Imatrix(
        512,
        3,
        ("calibration.txt", "more – text.txt"),
        {
            "blk.0.attn_q.weight": entry([4, 0, 8, 2], counts=[4]),
            "blk.0.ffn_up_exps.weight": entry([2, 4, 6, 8], [0, 0, 0, 0], [10, 20, 30, 40], counts=[2, 0, 10]),
        },
    )


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_f16_model(tmp_path_factory.mktemp("imatrix") / "dense.gguf")


def assert_equal(one: Imatrix, other: Imatrix) -> None:
    assert (one.chunk_size, one.chunk_count, one.datasets) == (other.chunk_size, other.chunk_count, other.datasets)
    assert one.entries.keys() == other.entries.keys()
    for name, kept in one.entries.items():
        np.testing.assert_array_equal(kept.in_sum2, other.entries[name].in_sum2)
        np.testing.assert_array_equal(kept.counts, other.entries[name].counts)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "i.gguf", sample())
    assert_equal(read_imatrix(tmp_path / "i.gguf"), sample())
    assert [path.name for path in tmp_path.iterdir()] == ["i.gguf"]


def test_the_file_is_laid_out_as_llama_cpps(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "i.gguf", sample())
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == list(sample().datasets)
    assert reader.fields["imatrix.chunk_count"].contents() == 3
    assert reader.fields["imatrix.chunk_size"].contents() == 512
    assert [(t.name, t.shape.tolist()) for t in reader.tensors] == [
        ("blk.0.attn_q.weight.in_sum2", [4, 1]),
        ("blk.0.attn_q.weight.counts", [1, 1]),
        ("blk.0.ffn_up_exps.weight.in_sum2", [4, 3]),
        ("blk.0.ffn_up_exps.weight.counts", [1, 3]),
    ]
    np.testing.assert_array_equal(reader.tensors[2].data, sample().entries["blk.0.ffn_up_exps.weight"].in_sum2)


def test_prepared_are_mean_squares_and_all_positive() -> None:
    made = prepared(sample())
    np.testing.assert_allclose(made["blk.0.attn_q.weight"], [1, 0.875e-6, 2, 0.5])
    assert made["blk.0.attn_q.weight"].dtype == np.float32


def test_an_expert_that_was_never_reached_gets_the_mean_of_the_others() -> None:
    means = prepared(sample())["blk.0.ffn_up_exps.weight"].reshape(3, 4)
    np.testing.assert_allclose(means[0], [1, 2, 3, 4])
    np.testing.assert_allclose(means[2], [1, 2, 3, 4])
    np.testing.assert_allclose(means[1], np.array([12, 24, 36, 48]) / 12)
    assert unreached(sample()) == {"blk.0.ffn_up_exps.weight": 1}
    assert "1 of 3 experts in 1 tensors were never reached" in unreached_notes(sample())[0]


def test_weights_that_no_token_reached_are_left_out() -> None:
    lost = Imatrix(512, 1, (), {"blk.0.ffn_up_exps.weight": entry([0, 0], [0, 0], counts=[0, 0])})
    assert prepared(lost) == {}


def test_inputs_that_are_always_zero_weigh_alike() -> None:
    silent = Imatrix(512, 1, (), {"w": entry([0, 0], [0, 2], counts=[5, 1])})
    np.testing.assert_allclose(prepared(silent)["w"], [1, 1, 1e-6, 2])


def test_a_models_own_imatrix_matches(dense: Path) -> None:
    header = read_header(dense)
    made = calibrate_tokens(dense)
    assert check_matches(made, header) == ()
    del made.entries["blk.2.ffn_up.weight"]
    assert "no entry for 1 of 28 weights (blk.2.ffn_up.weight)" in check_matches(made, header)[0]


def calibrate_tokens(model: Path) -> Imatrix:
    """The model has no tokenizer, so tokens are given."""
    tokens = np.random.default_rng(0).integers(0, 500, 60).astype(np.int32)
    weights = dict.fromkeys(observable(read_header(model), output_tensor=False), Mode.SUM2)
    return from_observed(observe(model, [tokens], weights, 1), 60, 1, ("tokens",))


@pytest.mark.parametrize(
    ("name", "width", "said"),
    [
        ("blk.0.attn_z.weight", EMBD, r"no weight blk\.0\.attn_z\.weight"),
        ("blk.0.ffn_down.weight", EMBD, r"ffn_down\.weight has 1 × 512 input channels in the model, 256 with 1 counts"),
    ],
)
def test_another_models_imatrix_is_refused(name: str, width: int, said: str, dense: Path) -> None:
    imatrix = Imatrix(512, 1, (), {name: Entry(np.ones((1, width), np.float32), np.ones(1, np.float32))})
    with pytest.raises(HomeinferError, match=said):
        check_matches(imatrix, read_header(dense))


def test_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    make_tiny_model("qwen3moe", tmp_path / "moe.gguf")
    header = read_header(tmp_path / "moe.gguf")
    tensor = header.by_name["blk.0.ffn_up_exps.weight"]
    n_in, n_expert = tensor.shape[0], tensor.shape[2]
    for experts, fits in ((n_expert, True), (n_expert // 2, False)):
        found = Entry(np.ones((experts, n_in * n_expert // experts), np.float32), np.ones(experts, np.float32))
        imatrix = Imatrix(512, 1, (), {tensor.name: found})
        if fits:
            check_matches(imatrix, header)
        else:
            with pytest.raises(HomeinferError, match="of another model"):
                check_matches(imatrix, header)


def test_views_of_weights_that_llama_imatrix_writes_are_passed_over(dense: Path) -> None:
    made = calibrate_tokens(dense)
    made.entries["blk.0.attn_q.weight (reshaped)"] = entry([1.0], counts=[1])
    assert check_matches(made, read_header(dense)) == ()


Change = Callable[[dict[str, Entry]], None]


def put(name: str, made: Entry) -> Change:
    return lambda entries: entries.update({name: made})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put("w", entry([np.nan, 1], counts=[1])), "the sums of w hold NaN"),
        (put("w", entry([np.inf, 1], counts=[1])), "the sums of w hold NaN, Inf"),
        (put("w", entry([-1, 1], counts=[1])), "the sums of w hold NaN, Inf or a negative"),
        (put("w", entry([1, 1], counts=[-1])), "the counts of w hold NaN, Inf or a negative"),
        (put("w", entry([1, 1], counts=[np.nan])), "the counts of w hold NaN"),
        (put("w", entry([1, 1], counts=[0.5])), "the counts of w are not whole"),
        (put("w", entry([1, 1], counts=[1e20])), "the counts of w are not whole numbers of a believable size"),
        (put("w", entry([1e30, 1], counts=[1])), "the sums of w are larger than"),
        (put("w", entry([1, 1, 1], counts=[1, 1])), "w has 2 counts for 3 sums"),
    ],
)
def test_numbers_that_no_model_gives_are_refused(change: Change, said: str, tmp_path: Path) -> None:
    imatrix = sample()
    change(imatrix.entries)
    write_imatrix(tmp_path / "i.gguf", imatrix)
    with pytest.raises(HomeinferError, match=said):
        read_imatrix(tmp_path / "i.gguf")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b"general.type", b"general.tipe", "not an imatrix"),
        (b"imatrix.chunk_size", b"imatrix.chunk_sice", "chunk_size' is missing"),
        (b"imatrix.datasets", b"imatrix.dataset5", "datasets' is missing"),
        (b"attn_q.weight.counts", b"attn_z.weight.counts", "attn_q.weight has sums and no counts"),
        (b"attn_q.weight.in_sum2", b"attn_z.weight.in_sum2", "has sums and no counts|has counts and no sums"),
        (b"attn_q.weight.in_sum2", b"attn_q.weight.in_sumx", "is neither sums nor counts"),
    ],
)
def test_a_damaged_file_is_refused(old: bytes, new: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"
    write_imatrix(path, sample())
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(HomeinferError, match=said):
        read_imatrix(path)


def test_the_older_format_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "old.dat"
    name = b"blk.0.attn_q.weight"
    path.write_bytes(struct.pack("<ii", 1, len(name)) + name + struct.pack("<iiff", 1, 2, 1.0, 2.0))
    with pytest.raises(HomeinferError, match=r"older \.dat") as caught:
        read_imatrix(path)
    assert "\n" not in str(caught.value)


def test_files_that_are_none_are_refused(tmp_path: Path, dense: Path) -> None:
    (tmp_path / "empty").touch()
    for path, said in (
        (tmp_path / "missing", "No such file"),
        (tmp_path, "directory"),
        (tmp_path / "empty", "empty"),
        (dense, "not an imatrix"),
    ):
        with pytest.raises(HomeinferError, match=said):
            read_imatrix(path)


@settings(max_examples=150, deadline=None)
@given(
    changes=st.dictionaries(st.integers(0, 10**6), st.integers(0, 255), min_size=1, max_size=4),
    kept=st.one_of(st.just(1.0), st.floats(0.001, 1)),
)
def test_a_file_with_changed_bytes_is_read_or_refused(
    changes: dict[int, int], kept: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.gguf"
    write_imatrix(path, sample())
    raw = bytearray(path.read_bytes())
    for place, byte in changes.items():
        raw[place % len(raw)] = byte
    path.write_bytes(raw[: max(1, int(kept * len(raw)))])
    try:
        read = read_imatrix(path)
    except HomeinferError:
        return
    for means in prepared(read).values():
        assert (means > 0).all()
        assert np.isfinite(means).all()


def test_an_imatrix_without_entries_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(HomeinferError, match="nothing to write"):
        write_imatrix(tmp_path / "i.gguf", Imatrix(512, 1, (), {}))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(HomeinferError, match="can't be written"):
        write_imatrix(tmp_path / "none" / "i.gguf", sample())


QUANTIZE = """
import ctypes, sys
import numpy as np
from homeinfer.engine import runtime
from homeinfer.quant.imatrix import prepared, read_imatrix
llama = runtime.llama()
data = prepared(read_imatrix(sys.argv[2]))
entries = (llama.llama_model_imatrix_data * (len(data) + 1))()
for entry, (name, values) in zip(entries, data.items()):
    entry.name, entry.size = name.encode(), values.size
    entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
params = llama.llama_model_quantize_default_params()
params.ftype, params.nthread, params.imatrix = llama.LLAMA_FTYPE_MOSTLY_IQ2_XXS, 1, entries
sys.exit(llama.llama_model_quantize(sys.argv[1].encode(), sys.argv[3].encode(), ctypes.byref(params)))
"""


def test_llama_cpp_quantizes_with_it_also_types_that_need_one(dense: Path, tmp_path: Path) -> None:
    made = calibrate_tokens(dense)
    made.entries["blk.0.attn_v.weight"].in_sum2[:] = 0  # what llama.cpp would divide by
    made.entries["blk.1.ffn_down.weight"].in_sum2[0, : FFN // 2] = 0
    write_imatrix(tmp_path / "i.gguf", made)
    paths = (str(dense), str(tmp_path / "i.gguf"), str(tmp_path / "small.gguf"))
    subprocess.run([sys.executable, "-c", QUANTIZE, *paths], check=True, capture_output=True, timeout=300)
    types = {tensor.name: tensor.type for tensor in read_header(tmp_path / "small.gguf").tensors}
    assert types["blk.1.ffn_up.weight"] == "IQ2_XXS"


def test_calibration_reads_whole_chunks_of_the_texts(smollm2_path: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The bakery opens at six and sells bread, rolls and cake.\n" * 12)
    header = read_header(smollm2_path)
    made = calibrate(header, [text], chunk_size=64, chunks=2, threads=2, output_tensor=False)
    assert (made.imatrix.chunk_size, made.imatrix.chunk_count, made.tokens) == (64, 2, 128)
    assert made.imatrix.datasets == ("text.txt",)
    assert len(made.imatrix.entries) == 30 * 7
    assert check_matches(made.imatrix, header) == ()
    more = calibrate(header, [text], chunk_size=64, chunks=99, threads=2, output_tensor=False)
    assert "the text has only 2 of 99 chunks" in more.notes
