"""The token loop on the device with the last window: what the head asks of it, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from homeinfer.cluster.local import RingOptions, start_local_ring
from homeinfer.cluster.ring import RingPipeline
from homeinfer.engine.edits import Remove
from homeinfer.engine.pipeline import Batch
from homeinfer.engine.request import Finish, Request, Sampling
from homeinfer.errors import HomeinferError
from homeinfer.model.header import read_header

GREEDY = Sampling(temperature=0)
PROMPT = list(range(1000, 1020))
N_CTX = 320


@pytest.fixture(scope="module", params=[1, 3])
def ring(request: pytest.FixtureRequest, smollm2_path: Path) -> Iterator[RingPipeline]:
    options = RingOptions(devices=request.param, n_ctx=N_CTX, n_threads=1)
    with closing(start_local_ring(read_header(smollm2_path), options)) as started:
        yield started


def told(
    ring: RingPipeline, prompt: list[int], request: Request, stop_after: int = 1 << 20
) -> tuple[list[int], Finish]:
    tokens: list[int] = []
    finish = ring.tell(prompt, request, tokens.append, lambda: len(tokens) >= stop_after)
    return tokens, finish


def test_tokens_are_the_likeliest_of_the_rings_own_logits(ring: RingPipeline) -> None:
    tokens, finish = told(ring, PROMPT, Request(GREEDY, 5, fresh=True))
    assert finish == Finish("length", 0, 0)
    ring.edit((Remove(0),))
    logits = [ring.forward(Batch.of([*PROMPT, *tokens[:4]], 0, last_only=True))]
    assert int(np.argmax(logits[0])) == tokens[4]


def test_a_token_that_ends_answers_ends_this_one(ring: RingPipeline) -> None:
    whole, _ = told(ring, PROMPT, Request(GREEDY, 12, fresh=True))
    end = whole[5]
    tokens, finish = told(ring, PROMPT, Request(GREEDY, 12, fresh=True, ends=(end, 1)))
    assert finish.reason == "stop"
    assert tokens == whole[: whole.index(end)]


def test_an_answer_that_is_stopped_ends_soon_and_the_next_one_is_right(ring: RingPipeline) -> None:
    whole, _ = told(ring, PROMPT, Request(GREEDY, 40, fresh=True))
    tokens, finish = told(ring, PROMPT, Request(GREEDY, 280, fresh=True), stop_after=3)
    assert finish.reason == "cancelled"
    assert 3 <= len(tokens) < 140
    assert tokens[:40] == whole[: len(tokens)]
    again, finish = told(ring, PROMPT, Request(GREEDY, 40))
    assert finish.reused == len(PROMPT) - 1
    assert again == whole


def test_what_costs_a_token_is_told_for_each_window(ring: RingPipeline) -> None:
    told(ring, PROMPT, Request(GREEDY, 3, fresh=True))
    assert len(ring.spent) == len(ring.devices)
    assert all(0 < window.computing <= window.holding for window in ring.spent)
    assert ring.choosing > 0


@pytest.mark.parametrize("n", [0, N_CTX, N_CTX + 500])
def test_a_prompt_that_does_not_fit_is_refused_by_the_device_too(n: int, ring: RingPipeline) -> None:
    with pytest.raises(HomeinferError, match=f"device-.: a prompt of {n} tokens does not fit a context of {N_CTX}"):
        told(ring, [5] * n, Request(GREEDY, 3))


def test_a_token_outside_the_vocabulary_is_refused_and_the_ring_goes_on(ring: RingPipeline) -> None:
    with pytest.raises(HomeinferError, match="a token is outside the vocabulary"):
        told(ring, [5, 1 << 20], Request(GREEDY, 3))
    assert len(told(ring, PROMPT, Request(GREEDY, 3))[0]) == 3


def test_a_grammar_that_cannot_be_read_is_refused_and_the_ring_goes_on(ring: RingPipeline) -> None:
    with pytest.raises(HomeinferError, match="the grammar can't be read"):
        told(ring, PROMPT, Request(Sampling(grammar="rut ::= ["), 3))
    tokens, _ = told(ring, PROMPT, Request(Sampling(grammar='root ::= "yes"'), 8))
    assert tokens
