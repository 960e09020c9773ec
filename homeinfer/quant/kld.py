"""Kullback-Leibler divergence between two models' next-token distributions, in numpy alone.

The convention is llama-perplexity's (tools/perplexity/perplexity.cpp): natural logarithms, the reference's
log-probabilities in 16 bits over the 16 nats below its likeliest token, tokens whose reference probability
is below e^-16 left out of the sum. A position's record keeps beside them, exactly, what 16 bits would blur.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor

import msgspec
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Records = npt.NDArray[np.void]
"""An array of `record_type`: the reference's distribution at some positions."""

_NATS = np.float32(16)
_STEPS = np.float32(65535)
_FINEST = np.float32(1e-30)
"""Steps smaller than this have no inverse worth the name: all tokens are as likely."""
_BLOCK_LOGITS = 1 << 17
"""Logits worked on at once by a thread: what is made of them stays in the processor's cache."""
_FEWEST_FOR_ERROR = 11


class NotFiniteError(ValueError):
    """Logits, or what is made of them, are NaN or infinite."""


class Scores(msgspec.Struct, frozen=True):
    """What each position gave, in nats: divergence, the model's and the reference's negative log-likelihood
    of the token that follows, and whether both find the same token likeliest."""

    kld: list[float]
    nll: list[float]
    nll_reference: list[float]
    same_top: list[bool]


class Statistics(msgspec.Struct, frozen=True):
    """Scores of all positions, as llama-perplexity sums them up; kld_p99 is interpolated linearly."""

    ppl: float
    ppl_reference: float
    mean_kld: float
    mean_kld_stderr: float
    kld_median: float
    kld_p99: float
    same_top: float


def record_type(n_vocab: int) -> np.dtype[np.void]:
    """One position of the reference: log-probability of token i is scale * codes[i] + least; nll belongs to the
    token that follows, top is the likeliest token. Little-endian, 16 + 2 * n_vocab bytes."""
    fields = [("scale", "<f4"), ("least", "<f4"), ("nll", "<f4"), ("top", "<u4"), ("codes", "<u2", (n_vocab,))]
    return np.dtype(fields)


def pack(logits: Floats, targets: Ints, executor: Executor | None = None, spans: int = 1) -> Records:
    """Records of a reference's logits, float32 [n, n_vocab], for the tokens that follow, int32 [n].

    Follows `log_softmax` with uint16_t output. Raises NotFiniteError for logits that are NaN or +Inf.
    """
    records = np.empty(len(logits), record_type(logits.shape[1]))
    _over_rows(lambda rows: _pack(logits[rows], targets[rows], records[rows]), logits.shape, executor, spans)
    return records


def compare(
    records: Records, logits: Floats, targets: Ints, executor: Executor | None = None, spans: int = 1
) -> Scores:
    """What a model's logits, float32 [n, n_vocab], differ from the reference's records, [n].

    Follows `log_softmax` with base_log_prob. Raises NotFiniteError when a divergence is no number.
    """
    kld, nll = np.empty(len(logits)), np.empty(len(logits))
    same = np.empty(len(logits), np.bool_)

    def work(rows: slice) -> None:
        kld[rows], nll[rows], same[rows] = _compare(records[rows], logits[rows], targets[rows])

    _over_rows(work, logits.shape, executor, spans)
    if not np.isfinite(kld).all() or not np.isfinite(nll).all():
        raise NotFiniteError
    return Scores(kld.tolist(), nll.tolist(), records["nll"].tolist(), same.tolist())


def statistics(scores: Sequence[Scores]) -> Statistics:
    """Sums up the scores of at least one position (kl_divergence in perplexity.cpp)."""
    kld = np.concatenate([part.kld for part in scores])
    nll = np.concatenate([part.nll for part in scores])
    nll_reference = np.concatenate([part.nll_reference for part in scores])
    same = np.concatenate([part.same_top for part in scores])
    with np.errstate(over="ignore"):
        ppl, ppl_reference = np.exp(nll.mean()), np.exp(nll_reference.mean())
    return Statistics(
        ppl=float(ppl),
        ppl_reference=float(ppl_reference),
        mean_kld=float(kld.mean()),
        mean_kld_stderr=float(kld.std(ddof=1) / np.sqrt(len(kld))) if len(kld) >= _FEWEST_FOR_ERROR else 0.0,
        kld_median=float(np.median(kld)),
        kld_p99=float(np.percentile(kld, 99)),
        same_top=float(same.mean()),
    )


def _over_rows(work: Callable[[slice], None], shape: tuple[int, ...], executor: Executor | None, spans: int) -> None:
    """Calls work on blocks of rows, several at once when there is an executor (numpy lets go of the GIL)."""
    rows = max(1, _BLOCK_LOGITS // shape[1])
    blocks = [slice(first, min(first + rows, shape[0])) for first in range(0, shape[0], rows)]

    def span(number: int) -> None:
        for block in blocks[number::spans]:
            work(block)

    if executor is None:
        spans = 1
        span(0)
        return
    for done in [executor.submit(span, number) for number in range(spans)]:
        done.result()


def _shifted(logits: Floats) -> tuple[Floats, npt.NDArray[np.intp], Doubles]:
    """Logits less their row's largest, that one's index, and the logarithm of the sum of their exponentials."""
    top = logits.argmax(axis=1)
    most = np.take_along_axis(logits, top[:, None], axis=1)
    if not np.isfinite(most).all():
        raise NotFiniteError
    shifted = logits - most
    return shifted, top, np.log(np.exp(shifted).sum(axis=1, dtype=np.float64))


def _at(values: Floats, columns: Ints) -> Floats:
    return np.take_along_axis(values, columns[:, None].astype(np.intp), axis=1)[:, 0]


def _pack(logits: Floats, targets: Ints, out: Records) -> None:
    shifted, top, log_sum = _shifted(logits)
    least = np.maximum(shifted.min(axis=1), -_NATS)
    scale = -least / _STEPS
    out["scale"], out["least"], out["top"] = scale, least - log_sum, top
    out["nll"] = log_sum - _at(shifted, targets)
    factor = np.divide(1, scale, out=np.zeros_like(scale), where=scale > _FINEST)
    np.maximum(shifted, least[:, None], out=shifted)
    shifted -= least[:, None]
    shifted *= factor[:, None]
    np.rint(shifted, out=shifted)
    # by way of int32, for which processors have an instruction
    out["codes"] = shifted.astype(np.int32)


def _compare(records: Records, logits: Floats, targets: Ints) -> tuple[Doubles, Doubles, npt.NDArray[np.bool_]]:
    shifted, top, log_sum = _shifted(logits)
    nll = log_sum - _at(shifted, targets)
    log_p = records["codes"] * records["scale"][:, None]
    log_p += records["least"][:, None]
    p = np.exp(log_p)
    p *= log_p > -_NATS
    if shifted.min() == -np.inf:
        shifted = np.where(p > 0, shifted, np.float32(0))
    log_p -= shifted
    log_p *= p
    kld = log_p.sum(axis=1, dtype=np.float64) + log_sum * p.sum(axis=1, dtype=np.float64)
    return kld, nll, top == records["top"]
