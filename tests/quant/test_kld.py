from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from homeinfer.quant.kld import NotFiniteError, Scores, compare, pack, record_type, statistics

Floats = npt.NDArray[np.float32]


def logits(rows: int, n_vocab: int, seed: int, spread: float = 3.0) -> Floats:
    return (np.random.default_rng(seed).standard_normal((rows, n_vocab)) * spread).astype(np.float32)


def targets(rows: int, n_vocab: int) -> npt.NDArray[np.int32]:
    return np.random.default_rng(7).integers(0, n_vocab, rows).astype(np.int32)


def exact_log_p(values: Floats) -> npt.NDArray[np.float64]:
    wide = values.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=1, keepdims=True)))


@pytest.mark.parametrize("n_vocab", [2, 127, 1000, 49152])
def test_divergence_is_that_of_exact_arithmetic(n_vocab: int) -> None:
    reference, follow = logits(20, n_vocab, 1), targets(20, n_vocab)
    model = reference + logits(20, n_vocab, 2, spread=0.2)
    scores = compare(pack(reference, follow), model, follow)
    p, q = exact_log_p(reference), exact_log_p(model)
    rows = np.arange(20)
    assert scores.kld == pytest.approx((np.exp(p) * (p - q)).sum(axis=1), rel=0.01, abs=1e-4)
    assert scores.nll == pytest.approx(-q[rows, follow], rel=1e-5)
    assert scores.nll_reference == pytest.approx(-p[rows, follow], rel=1e-5)
    assert scores.same_top == (p.argmax(axis=1) == q.argmax(axis=1)).tolist()


def test_a_model_does_not_diverge_from_itself() -> None:
    same, follow = logits(50, 5000, 3), targets(50, 5000)
    scores = compare(pack(same, follow), same, follow)
    assert max(map(abs, scores.kld)) < 1e-4
    assert all(scores.same_top)
    assert scores.nll == pytest.approx(scores.nll_reference, rel=1e-6)


def test_threads_change_nothing() -> None:
    reference, model, follow = logits(33, 20_000, 1), logits(33, 20_000, 2), targets(33, 20_000)
    with ThreadPoolExecutor(3) as pool:
        records = pack(reference, follow, pool, 3)
        assert records.tobytes() == pack(reference, follow).tobytes()
        assert compare(records, model, follow, pool, 3) == compare(records, model, follow)


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=40))
def test_packed_log_probabilities_are_within_half_a_step_of_16_nats(values: list[float]) -> None:
    row = np.array([values], np.float32)
    packed = pack(row, np.zeros(1, np.int32))[0]
    log_p = packed["codes"] * packed["scale"] + packed["least"]
    exact = exact_log_p(row)[0]
    near = exact > exact.max() - 16
    assert np.abs(log_p - exact)[near].max() < 16 / 65535 + 1e-3 * (np.abs(exact.max()) + 1)
    assert log_p.max() - log_p.min() < 16.001
    assert packed["top"] == row.argmax()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("spread", [0.0, 1e-45, 1e-38, 1e-30, 1e-6])
def test_tokens_that_are_all_as_likely_are_packed_too(spread: float) -> None:
    row = np.array([[0, spread, 0, spread / 2]], np.float32)
    follow = np.array([2], np.int32)
    scores = compare(pack(row, follow), row, follow)
    assert scores.kld == pytest.approx([0], abs=1e-6)
    assert scores.nll_reference == pytest.approx([math.log(4)], rel=1e-5)


def test_impossible_tokens_of_both_models_count_nothing() -> None:
    row = np.array([[1.0, 2.0, -np.inf, 0.5]], np.float32)
    follow = np.array([1], np.int32)
    scores = compare(pack(row, follow), row, follow)
    assert scores.kld == pytest.approx([0], abs=1e-4)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_refused(broken: float) -> None:
    good, follow = logits(3, 50, 1), targets(3, 50)
    bad = good.copy()
    bad[1, 30] = broken
    records = pack(good, follow)
    with pytest.raises(NotFiniteError):
        pack(bad, follow)
    with pytest.raises(NotFiniteError):
        compare(records, bad, follow)


def test_token_that_only_the_model_finds_impossible_is_refused() -> None:
    good, follow = logits(3, 50, 1), targets(3, 50)
    bad = good.copy()
    bad[1, 30] = -np.inf
    with pytest.raises(NotFiniteError):
        compare(pack(good, follow), bad, follow)


def test_record_takes_the_bytes_that_its_file_format_says() -> None:
    for n_vocab in (1, 7, 49152):
        assert record_type(n_vocab).itemsize == 16 + 2 * n_vocab


def test_statistics_sum_up_all_parts_alike() -> None:
    kld = np.random.default_rng(5).exponential(0.3, 101)
    nll = kld + 1
    whole = Scores(kld.tolist(), nll.tolist(), kld.tolist(), [True] * 75 + [False] * 26)
    parts = [
        Scores(whole.kld[a:b], whole.nll[a:b], whole.nll_reference[a:b], whole.same_top[a:b])
        for a, b in ((0, 40), (40, 40), (40, 101))
    ]
    found = statistics(parts)
    assert found == statistics([whole])
    assert found.mean_kld == pytest.approx(kld.sum() / 101)
    assert found.mean_kld_stderr == pytest.approx(math.sqrt(((kld**2).mean() - kld.mean() ** 2) / 100))
    assert found.kld_median == np.sort(kld)[50]
    assert found.kld_p99 == pytest.approx(np.sort(kld)[99])
    assert found.ppl == pytest.approx(math.exp(kld.mean() + 1))
    assert found.ppl_reference == pytest.approx(math.exp(kld.mean()))
    assert found.same_top == pytest.approx(75 / 101)


def test_few_positions_have_no_standard_error_and_much_surprise_no_finite_perplexity() -> None:
    found = statistics([Scores([0.1] * 10, [1000.0] * 10, [1.0] * 10, [True] * 10)])
    assert found.mean_kld_stderr == 0
    assert found.ppl == math.inf
