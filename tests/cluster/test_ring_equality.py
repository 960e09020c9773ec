"""A ring says what llama.cpp alone says, however many devices it has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from homeinfer.cluster.local import RingOptions, start_local_ring, window_specs
from homeinfer.engine.edits import Copy, Keep, KvEdit, Remove, Shift
from homeinfer.engine.pipeline import Batch, Floats, Ints
from homeinfer.engine.request import Sampling
from homeinfer.engine.tokenizer import Tokenizer
from homeinfer.engine.window import LayerWindow
from homeinfer.model.header import Header, read_header
from homeinfer.model.window_plan import n_layers
from tests.support.reference import GREEDY, Agreement, Reference, agreement, references, ring_answers

LIMIT = 32
LIMITS = {1: LIMIT, 2: 12, 3: 12, 5: LIMIT}
"""Tokens of each answer, by number of devices: what is between one device and five differs in its hops alone, and does
without the longest prompt. scripts/check_tokens.py compares as many as one likes."""
LONGEST = {"smollm2": 200, "gemma": 600}
"""Tokens of the longest prompt: more than a batch, and more than Gemma's sliding windows see (512)."""
N_BATCH = {"smollm2": 128, "gemma": 512}
MODELS = tuple(LONGEST)
PROMPTS = (
    "Once upon a time, in a village at the foot of the mountains, there was a",
    "The history of the steam engine begins with",
    "def fibonacci(n):\n    ",
    "Q: Why is the sky blue?\nA:",
    "1, 1, 2, 3, 5, 8, 13,",
    "Dear Sir or Madam,\nI am writing to complain about the train that",
    "Die Hauptstadt von Österreich ist Wien, und die Donau fließt",
    "The log of the ship, day by day. "
    + " ".join(f"Day {i}: wind {i * 7 % 9}, {i * 13 % 97} miles, {'calm' if i % 3 else 'rough'}." for i in range(90)),
)
TALK = "Once upon a time there was a little robot who"


class Answers:
    """References of each model and how each ring agrees with them, computed once, two at a time: one ring keeps one
    core busy."""

    def __init__(self, paths: dict[str, Path], pool: Executor) -> None:
        self._paths = paths
        self._expected = {model: pool.submit(self._references, model) for model in MODELS}
        self._agreements = {
            (model, devices): pool.submit(self._compare, model, devices) for model in MODELS for devices in LIMITS
        }

    def expected(self, model: str) -> list[Reference]:
        return self._expected[model].result()

    def agreement(self, model: str, devices: int) -> Agreement:
        return self._agreements[model, devices].result()

    def _references(self, model: str) -> list[Reference]:
        return references(self._paths[model], PROMPTS, LIMIT, longest=LONGEST[model], n_batch=N_BATCH[model])

    def _compare(self, model: str, devices: int) -> Agreement:
        limit = LIMITS[devices]
        expected = self.expected(model)[: None if limit == LIMIT else -1]
        options = RingOptions(devices=devices, n_ctx=2048, n_batch=N_BATCH[model], n_threads=2 if devices == 2 else 1)
        outcomes = ring_answers(self._paths[model], options, [e.prompt for e in expected], GREEDY, limit)
        begun = [Reference(e.prompt, e.tokens[:limit], e.margins[:limit]) for e in expected]
        return agreement(begun, [o.tokens for o in outcomes])


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    made = ThreadPoolExecutor(2)
    yield made
    made.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def answers(smollm2_path: Path, gemma_path: Path, pool: Executor) -> Answers:
    return Answers({"smollm2": smollm2_path, "gemma": gemma_path}, pool)


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Header:
    return read_header(smollm2_path)


@pytest.fixture(scope="module")
def talk(smollm2_path: Path) -> list[int]:
    with closing(Tokenizer(str(smollm2_path))) as tokenizer:
        return tokenizer.encode(TALK)


@pytest.mark.parametrize("model", MODELS)
def test_prompts_become_the_same_tokens(model: str, answers: Answers, request: pytest.FixtureRequest) -> None:
    with closing(Tokenizer(str(request.getfixturevalue(f"{model}_path")))) as tokenizer:
        prompts = [tokenizer.encode(text)[: LONGEST[model]] for text in PROMPTS]
    assert prompts == [e.prompt for e in answers.expected(model)]
    assert max(map(len, prompts)) == LONGEST[model] > N_BATCH[model]


@pytest.mark.parametrize("devices", LIMITS)
@pytest.mark.parametrize("model", MODELS)
def test_greedy_tokens_are_those_of_llama_cpp(model: str, devices: int, answers: Answers) -> None:
    found = answers.agreement(model, devices)
    print(f"{model}, {devices} devices: {found.tokens} tokens, {found.ties} near ties")
    assert found.tokens > len(PROMPTS) * LIMITS[devices] // 2


def test_near_ties_are_rarer_than_one_in_a_thousand_tokens(answers: Answers) -> None:
    found = [answers.agreement(model, devices) for model in MODELS for devices in LIMITS]
    tokens = sum(f.tokens for f in found)
    assert tokens > 1000
    assert 1000 * sum(f.ties for f in found) <= tokens


def test_the_same_seed_gives_the_same_text_on_any_ring(smollm2_path: Path, talk: list[int], pool: Executor) -> None:
    def text(devices: int, seed: int) -> str:
        options = RingOptions(devices=devices, n_ctx=256, n_threads=1)
        return ring_answers(smollm2_path, options, [talk], Sampling(temperature=0.8, seed=seed), 32)[0].text

    alone, together, other = pool.map(text, (1, 3, 3), (7, 7, 8))
    assert alone == together != other


def test_a_network_ring_answers_the_same(smollm2_path: Path, answers: Answers) -> None:
    first = answers.expected("smollm2")[0]
    options = RingOptions(devices=3, n_ctx=2048, n_batch=N_BATCH["smollm2"], n_threads=1, network=True)
    (outcome,) = ring_answers(smollm2_path, options, [first.prompt], GREEDY, LIMIT)
    assert agreement([first], [outcome.tokens]).ties == 0


def test_streamed_windows_answer_as_a_streamed_model_does(smollm2_path: Path, talk: list[int], pool: Executor) -> None:
    def tokens(devices: int) -> list[int]:
        options = RingOptions(devices=devices, n_ctx=256, n_threads=1, resident=False)
        return ring_answers(smollm2_path, options, [talk], GREEDY, 24)[0].tokens

    alone, together = pool.map(tokens, (1, 3))
    assert alone == together


def test_a_full_context_shifts_alike_on_any_ring(smollm2_path: Path, talk: list[int], pool: Executor) -> None:
    def outcome(devices: int) -> tuple[list[int], int]:
        options = RingOptions(devices=devices, n_ctx=64, n_threads=1)
        (got,) = ring_answers(smollm2_path, options, [talk], Sampling(temperature=0.8, seed=3), 100)
        return got.tokens, got.shifted

    alone, together = pool.map(outcome, (1, 3))
    tokens, shifted = together
    assert len(tokens) == 100
    assert shifted > 0
    assert together == alone


def several_sequences(forward: Callable[[Batch], Floats], edit: Callable[[list[KvEdit]], None]) -> Floats:
    """Three sequences that begin alike, one of which forgets a part of its middle: the logits of every batch."""
    rng = np.random.default_rng(5)
    tokens = rng.integers(100, 40_000, 64).astype(np.int32)
    rows = [forward(Batch.of(tokens[:24].tolist(), 0))]
    edit([Remove(0, 8, 16), Shift(0, 16, 24, -8), Copy(0, 1), Copy(0, 2)])
    for sequence, first, n in ((0, 24, 2), (1, 26, 3), (2, 29, 6)):
        rows.append(forward(mixed(tokens[first : first + n], list(range(16, 16 + n)), [sequence] * n)))
    edit([Remove(2, 12)])
    rows.append(forward(mixed(tokens[35:38], [18, 19, 12], [0, 1, 2])))
    edit([Remove(1, 17), Keep(1)])
    rows.append(forward(mixed(tokens[38:41], [17, 18, 19], [1, 1, 1])))
    rows.append(forward(mixed(tokens[41:43], [20, 0], [1, 2])))
    return np.concatenate(rows)


def mixed(tokens: Ints, positions: list[int], sequences: list[int]) -> Batch:
    return Batch(
        np.asarray(tokens, np.int32),
        np.asarray(positions, np.int32),
        np.asarray(sequences, np.int32),
        np.ones(len(tokens), np.bool_),
    )


def test_several_sequences_and_edits_give_the_logits_of_one_window(smollm2: Header) -> None:
    options = RingOptions(devices=2, n_ctx=128, n_seq=3, n_batch=64, n_threads=1)
    n = n_layers(smollm2)
    (spec,) = window_specs(smollm2, [(0, n)], options)
    with closing(LayerWindow(spec)) as whole:
        expected = several_sequences(
            lambda b: whole.forward(b.tokens, b.positions, b.sequences, b.wanted), lambda edits: whole.edit(edits)
        )
    with closing(start_local_ring(smollm2, options)) as ring:
        got = several_sequences(ring.forward, ring.edit)
    assert got.shape == (1 + 11 + 3 + 3 + 2, 49_152)
    assert np.array_equal(got, expected)


def test_the_comparison_tells_near_ties_from_differences() -> None:
    expected = [Reference([1], [5, 6, 7, 8], [1.0, 0.01, 1.0, 1.0])]
    assert agreement(expected, [[5, 6, 7, 8]]) == Agreement(4, 0)
    assert agreement(expected, [[5, 9, 9, 9]]) == Agreement(2, 1)
    for other in ([5, 6, 9, 8], [9, 6, 7, 8], [5, 6, 7]):
        with pytest.raises(AssertionError):
            agreement(expected, [other])
