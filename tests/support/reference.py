"""What llama.cpp alone answers, and whether another answer is the same."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import llama_cpp
import msgspec
import numpy as np

from homeinfer.cluster.local import RingOptions, start_local_ring
from homeinfer.engine.answers import Generator, Outcome
from homeinfer.engine.edits import Remove
from homeinfer.engine.request import Sampling
from homeinfer.engine.tokenizer import Tokenizer
from homeinfer.model.header import read_header

NEAR = 0.05
"""Two logits that are closer than this may change places where sums are taken in another order."""

GREEDY = Sampling(temperature=0)


class Reference(msgspec.Struct, frozen=True):
    """A greedy answer of llama-cpp-python's Llama: the prompt's tokens, the answer's, and at each of these how far
    the best logit was above the second."""

    prompt: list[int]
    tokens: list[int]
    margins: list[float]


class Agreement(msgspec.Struct, frozen=True):
    """Tokens that were compared, and the answers that parted at a near tie."""

    tokens: int
    ties: int


def references(
    model: Path, prompts: Sequence[str], limit: int, *, longest: int, n_ctx: int = 2048, n_batch: int = 512
) -> list[Reference]:
    """Greedy answers of `limit` tokens, as `Llama.generate(temp=0)` gives them; prompts are cut at `longest` tokens."""
    llama = llama_cpp.Llama(str(model), n_ctx=n_ctx, n_batch=n_batch, n_threads=1, n_threads_batch=1, verbose=False)
    with closing(llama):
        return [_reference(llama, llama.tokenize(text.encode())[:longest], limit) for text in prompts]


def _reference(llama: llama_cpp.Llama, prompt: list[int], limit: int) -> Reference:
    tokens: list[int] = []
    margins: list[float] = []
    llama.reset()  # type: ignore[no-untyped-call]
    llama.eval(prompt)
    while len(tokens) < limit:
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llama.ctx, -1), (llama.n_vocab(),))
        token = int(logits.argmax())
        others = max(logits[:token].max(initial=-np.inf), logits[token + 1 :].max(initial=-np.inf))
        tokens.append(token)
        margins.append(float(logits[token] - others))
        llama.eval([token])
    return Reference(prompt, tokens, margins)


def agreement(expected: Sequence[Reference], answers: Sequence[Sequence[int]]) -> Agreement:
    """Compare token by token, each answer up to its first difference.

    Raises AssertionError for a difference where the reference's two best logits are not near each other, and for an
    answer of another length.
    """
    compared = ties = 0
    for number, (reference, answer) in enumerate(zip(expected, answers, strict=True)):
        assert len(answer) == len(reference.tokens), f"answer {number} has {len(answer)} tokens"
        wrong = [i for i, (a, b) in enumerate(zip(reference.tokens, answer, strict=True)) if a != b]
        first = wrong[0] if wrong else len(answer)
        if wrong and reference.margins[first] >= NEAR:
            raise AssertionError(
                f"answer {number} parts from the reference at token {first}, where its best logit is "
                f"{reference.margins[first]:.3f} above the second: {answer[first]} instead of {reference.tokens[first]}"
            )
        compared += first + bool(wrong)
        ties += bool(wrong)
    return Agreement(compared, ties)


def ring_answers(
    model: Path, options: RingOptions, prompts: Sequence[Sequence[int]], sampling: Sampling, limit: int
) -> list[Outcome]:
    """The answers of a local ring, each from an empty memory."""
    tokenizer = Tokenizer(str(model))
    with closing(tokenizer), closing(start_local_ring(read_header(model), options)) as pipeline:
        outcomes = []
        for prompt in prompts:
            pipeline.edit((Remove(0),))
            outcomes.append(Generator(pipeline, tokenizer).answer(prompt, sampling, limit))
        return outcomes
