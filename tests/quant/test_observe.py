from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from homeinfer.engine.graph_nodes import product_operations
from homeinfer.errors import HomeinferError
from homeinfer.model.header import read_header
from homeinfer.quant import observe as observing
from homeinfer.quant.observe import Ints, Mode, Squares, observable, observe
from homeinfer.quant.observer_process import observe_in_process, tokenize_in_process
from tests.quant.f16_model import VOCAB, write_f16_model
from tests.quant.recorded_inputs import Product, recorded_inputs
from tests.support.processes import have_ended, running, wait_until
from tests.support.tiny_models import make_tiny_model

MIXTURES = ("qwen3moe", "gpt-oss", "deepseek2")


def chunks(vocab: int, *lengths: int) -> list[Ints]:
    rng = np.random.default_rng(4)
    return [rng.integers(0, vocab, length).astype(np.int32) for length in lengths]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_f16_model(tmp_path_factory.mktemp("observe") / "dense.gguf")


def squares_of(products: list[Product], shape: tuple[int, ...]) -> Squares:
    """The convention of tools/imatrix, written once more."""
    n_in, matrices = shape[0], shape[2] if len(shape) > 2 else 1
    sums = np.zeros((matrices, n_in))
    counts = np.zeros(matrices, np.int64)
    for inputs, experts in products:
        squares = inputs.astype(np.float64) ** 2
        if experts is None:
            for matrix in range(matrices):
                sums[matrix] += squares[:, matrix::matrices].sum(axis=(0, 1, 2))
            counts[0] += inputs[..., 0].size // matrices
            continue
        for token, chosen in enumerate(experts):
            for slot, expert in enumerate(chosen):
                sums[expert] += squares[0, token, slot % inputs.shape[2]]
                counts[expert] += 1
    mixture = any(product.experts is not None for product in products)
    return Squares(sums if mixture else sums.reshape(1, -1), counts if mixture else counts[:1])


def check_squares(model: Path, given: list[Ints]) -> None:
    header = read_header(model)
    names = observable(header, output_tensor=True)
    observed = observe(model, given, dict.fromkeys(names, Mode.SUM2), 1)
    recorded = recorded_inputs(model, [chunk.tolist() for chunk in given], names)
    assert observed.tokens == sum(map(len, given))
    assert set(observed.unused) == {name for name in names if not recorded[name]}
    assert set(observed.squares) == set(names) - set(observed.unused)
    for name, squares in observed.squares.items():
        expected = squares_of(recorded[name], header.by_name[name].shape)
        np.testing.assert_array_equal(squares.counts, expected.counts, name)
        np.testing.assert_allclose(squares.in_sum2, expected.in_sum2, rtol=1e-4, atol=1e-9, err_msg=name)


def test_squares_of_a_dense_model_are_those_of_its_inputs(dense: Path) -> None:
    check_squares(dense, chunks(VOCAB, 60, 33))


@pytest.mark.parametrize("arch", MIXTURES)
def test_squares_of_a_mixture_are_those_of_each_experts_inputs(arch: str, tmp_path: Path) -> None:
    model = tmp_path / "tiny.gguf"
    make_tiny_model(arch, model)
    check_squares(model, chunks(120, 40, 17))


@pytest.mark.parametrize("arch", ["gemma3n", "hrm_text"])
def test_a_weight_that_a_graph_uses_several_times_gets_all_its_inputs(arch: str, tmp_path: Path) -> None:
    model = tmp_path / "tiny.gguf"
    make_tiny_model(arch, model)
    given = chunks(120, 20, 20)
    check_squares(model, given)
    weights = [name for name in observable(read_header(model), output_tensor=False) if "attn_q.weight" in name][:2]
    grams = observe(model, given, dict.fromkeys(weights, Mode.GRAM), 1)
    squares = observe(model, given, dict.fromkeys(weights, Mode.SUM2), 1).squares
    for name in weights:
        np.testing.assert_allclose(np.diag(grams.gram(name)), squares[name].in_sum2[0], rtol=1e-3)
        assert grams.n_rows[grams.inputs[name]] == squares[name].counts[0]


def test_heads_with_matrices_of_their_own_have_one_count(tmp_path: Path) -> None:
    model = tmp_path / "tiny.gguf"
    make_tiny_model("deepseek2", model)
    tensor = read_header(model).by_name["blk.0.attn_k_b.weight"]
    seen = observe(model, chunks(120, 40), {tensor.name: Mode.SUM2}, 1).squares[tensor.name]
    assert seen.in_sum2.shape == (1, tensor.shape[0] * tensor.shape[2])
    assert seen.counts.tolist() == [40]


def test_a_tied_output_is_the_embedding(gemma_path: Path) -> None:
    header = read_header(gemma_path)
    assert observable(header, output_tensor=True)[-1] == "token_embd.weight"
    assert "token_embd.weight" not in observable(header, output_tensor=False)
    seen = observe(gemma_path, chunks(1000, 16), {"token_embd.weight": Mode.SUM2}, 2)
    assert seen.squares["token_embd.weight"].counts.tolist() == [16]


def test_rows_are_the_inputs_and_grams_their_products(dense: Path) -> None:
    given = chunks(VOCAB, 50, 20)
    names = observable(read_header(dense), output_tensor=False)
    rows = observe(dense, given, dict.fromkeys(names, Mode.ROWS), 1)
    grams = observe(dense, given, dict.fromkeys(names, Mode.GRAM), 1)
    recorded = recorded_inputs(dense, [chunk.tolist() for chunk in given], names)
    for name in names:
        expected = np.concatenate([product.inputs[0, 0] for product in recorded[name]])
        np.testing.assert_allclose(rows.rows[rows.inputs[name]], expected, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(grams.gram(name), expected.T @ expected, rtol=1e-3, atol=1e-2)
        assert grams.n_rows[grams.inputs[name]] == 70


def test_weights_with_one_input_share_its_rows(dense: Path) -> None:
    names = observable(read_header(dense), output_tensor=False)
    seen = observe(dense, chunks(VOCAB, 20), dict.fromkeys(names, Mode.GRAM), 1)
    assert len({seen.inputs[f"blk.1.attn_{role}.weight"] for role in "qkv"}) == 1
    assert seen.inputs["blk.1.ffn_gate.weight"] == seen.inputs["blk.1.ffn_up.weight"]
    assert len(seen.grams) == 4 * 4


def test_a_chunk_in_pieces_gives_what_a_whole_one_gives(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = observable(read_header(dense), output_tensor=True)
    modes = {name: Mode.ROWS if "ffn" in name else Mode.SUM2 for name in names}
    whole = observe(dense, chunks(VOCAB, 64, 41), modes, 1)
    monkeypatch.setattr(observing, "_ROWS_BYTES", 1)
    shares: list[float] = []
    pieces = observe(dense, chunks(VOCAB, 64, 41), modes, 1, shares.append)
    assert shares == sorted(shares)
    assert len(shares) == 4
    assert shares[-1] == 1
    for name, squares in whole.squares.items():
        np.testing.assert_allclose(pieces.squares[name].in_sum2, squares.in_sum2, rtol=1e-2)
    for name, rows in whole.rows.items():
        np.testing.assert_allclose(pieces.rows[name], rows, rtol=1e-2, atol=1e-2)


def test_chunks_do_not_see_each_other(dense: Path) -> None:
    first, second = chunks(VOCAB, 30, 30)
    weights = {"blk.3.ffn_down.weight": Mode.SUM2}
    both = observe(dense, [first, second], weights, 1).squares["blk.3.ffn_down.weight"]
    apart = [observe(dense, [chunk], weights, 1).squares["blk.3.ffn_down.weight"] for chunk in (first, second)]
    np.testing.assert_allclose(both.in_sum2, apart[0].in_sum2 + apart[1].in_sum2, rtol=1e-6)


def test_a_child_process_gives_the_same(dense: Path) -> None:
    given = chunks(VOCAB, 30, 12)
    names = observable(read_header(dense), output_tensor=False)
    modes = {name: list(Mode)[i % 3] for i, name in enumerate(names)}
    here, there = observe(dense, given, modes, 1), observe_in_process(dense, given, modes, 1)
    assert (there.tokens, there.inputs, there.n_rows, there.unused) == (here.tokens, here.inputs, here.n_rows, ())
    for name, squares in here.squares.items():
        np.testing.assert_array_equal(there.squares[name].in_sum2, squares.in_sum2)
        np.testing.assert_array_equal(there.squares[name].counts, squares.counts)
    for mine, theirs in ((here.grams, there.grams), (here.rows, there.rows)):
        assert mine.keys() == theirs.keys()
        for name, array in mine.items():
            np.testing.assert_allclose(theirs[name], array, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("weights", "said"),
    [({"blk.9.attn_q.weight": Mode.SUM2}, "blk.9.attn_q.weight"), ({}, "nothing to observe")],
)
def test_weights_that_are_not_there_are_refused(weights: dict[str, Mode], said: str, dense: Path) -> None:
    with pytest.raises(HomeinferError, match=said):
        observe(dense, chunks(VOCAB, 8), weights, 1)


def test_tokens_outside_the_vocabulary_are_refused(dense: Path) -> None:
    with pytest.raises(HomeinferError, match="llama_decode failed"):
        observe_in_process(dense, [np.array([1, VOCAB], np.int32)], {"blk.0.attn_q.weight": Mode.SUM2}, 1)


def test_a_weight_that_is_no_number_is_said(tmp_path: Path) -> None:
    model = write_f16_model(tmp_path / "nan.gguf", nan_in="blk.1.attn_v.weight")
    names = observable(read_header(model), output_tensor=False)
    with pytest.raises(HomeinferError, match=r"inputs of blk\.1\.attn_output\.weight are not all finite"):
        observe_in_process(model, chunks(VOCAB, 16), dict.fromkeys(names, Mode.SUM2), 1)


def test_a_model_that_llama_cpp_refuses_is_one_line(dense: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(dense.read_bytes().replace(b"llama.attention.head_count\x04", b"llama.attention.head_cound\x04"))
    with pytest.raises(HomeinferError, match=r"broken\.gguf can't be loaded: .*attn_q"):
        observe_in_process(broken, chunks(VOCAB, 8), {"blk.0.attn_q.weight": Mode.SUM2}, 1)


def observers() -> list[psutil.Process]:
    return running("homeinfer.quant.observer_process", recursive=True)


def test_a_process_that_dies_is_one_line(dense: Path) -> None:
    killed = []

    def kill(_share: float) -> None:
        killed.extend(observers())
        killed[0].kill()

    with pytest.raises(HomeinferError, match="the process that ran the model was killed"):
        observe_in_process(dense, chunks(VOCAB, *[60] * 4000), {"output.weight": Mode.SUM2}, 1, kill)
    assert killed
    assert not observers()


def test_the_process_ends_with_its_parent(dense: Path) -> None:
    program = (
        "import sys, numpy as np; from homeinfer.quant.observer_process import *; "
        "tokens = [np.zeros(60, np.int32)] * 20000; weights = {'output.weight': Mode.SUM2}; "
        "observe_in_process(sys.argv[1], tokens, weights, 1, lambda share: print(share, flush=True))"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, str(dense)], stdout=subprocess.PIPE)
    try:
        assert parent.stdout is not None
        parent.stdout.readline()
        children = psutil.Process(parent.pid).children()
        os.kill(parent.pid, signal.SIGKILL)
        wait_until(lambda: have_ended(children))
        assert children
    finally:
        parent.kill()
        parent.communicate()


def test_tokens_are_those_of_llama_imatrix(smollm2_path: Path) -> None:
    tokens = tokenize_in_process(smollm2_path, "The bakery. <|im_start|>")
    assert tokens.begin is None
    assert len(tokens.ids) > 6  # the name of a special token is text here
    assert tokens.ids.dtype == np.int32


def test_a_model_without_a_vocabulary_takes_no_text(dense: Path) -> None:
    began = time.monotonic()
    with pytest.raises(HomeinferError, match="no vocabulary"):
        tokenize_in_process(dense, "text")
    assert time.monotonic() - began < 60


def test_the_native_view_of_a_tensor_is_llama_cpps() -> None:
    assert product_operations()[0] != product_operations()[1]
