"""Choosing tokens: what each setting does to the choice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from homeinfer.engine.pipeline import Floats
from homeinfer.engine.request import Sampling
from homeinfer.engine.sampling import Sampler
from homeinfer.engine.tokenizer import Tokenizer
from homeinfer.errors import HomeinferError

YES_OR_NO = 'root ::= "yes" | "no"'


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> Iterator[Tokenizer]:
    with closing(Tokenizer(str(smollm2_path))) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def logits(tokenizer: Tokenizer) -> list[Floats]:
    """Rows of random logits, flat enough that temperature matters."""
    return list(np.random.default_rng(2).standard_normal((8, tokenizer.n_vocab), np.float32) * 3)


def chosen(sampling: Sampling, tokenizer: Tokenizer, logits: list[Floats]) -> list[int]:
    with closing(Sampler(sampling, tokenizer)) as sampler:
        return [sampler.choose(row) for row in logits]


def greedy(logits: list[Floats]) -> list[int]:
    return [int(row.argmax()) for row in logits]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0),
        Sampling(temperature=0, top_k=5, seed=3),
        Sampling(temperature=0, repeat_penalty=1.1),
        Sampling(temperature=2, top_k=1),
        Sampling(temperature=2, top_k=0, top_p=1e-6),
        Sampling(temperature=2, top_k=0, top_p=1, min_p=1),
        Sampling(temperature=0.001, top_k=0, top_p=1, min_p=0),
    ],
    ids=repr,
)
def test_settings_at_their_ends_take_the_likeliest(
    sampling: Sampling, tokenizer: Tokenizer, logits: list[Floats]
) -> None:
    assert chosen(sampling, tokenizer, logits) == greedy(logits)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 2, 2**32 - 1])
def test_the_same_seed_makes_the_same_choice(seed: int, tokenizer: Tokenizer, logits: list[Floats]) -> None:
    sampling = Sampling(temperature=1.5, seed=seed)
    assert len({tuple(chosen(sampling, tokenizer, logits)) for _ in range(3)}) == 1


def test_other_seeds_make_other_choices(tokenizer: Tokenizer, logits: list[Floats]) -> None:
    wide = [Sampling(temperature=1.5, top_k=0, top_p=1, min_p=0, seed=seed) for seed in range(5)]
    assert len({tuple(chosen(sampling, tokenizer, logits)) for sampling in wide}) == 5


def test_only_the_top_k_are_chosen(tokenizer: Tokenizer, logits: list[Floats]) -> None:
    best = set(np.argsort(logits[0])[-3:].tolist())
    sampling = Sampling(temperature=100, top_k=3, top_p=1, min_p=0)
    assert set(chosen(sampling, tokenizer, [logits[0]] * 60)) == best


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_lets_only_its_words_through(temperature: float, tokenizer: Tokenizer, logits: list[Floats]) -> None:
    for seed in range(6):
        sampling = Sampling(temperature=temperature, seed=seed, grammar=YES_OR_NO)
        said = b""
        with closing(Sampler(sampling, tokenizer)) as sampler:
            for row in logits:
                token = sampler.choose(row)
                if tokenizer.ends(token):
                    break
                said += tokenizer.piece(token)
            else:
                raise AssertionError(f"the answer did not end: {said!r}")
        assert said in (b"yes", b"no")


@pytest.mark.parametrize(
    "grammar",
    ["", "  \n", 'root ::= "yes', 'start ::= "yes"', "root ::= other", "root ::= root", "\0", "👍"],
    ids=repr,
)
def test_a_grammar_that_is_none_is_refused(
    grammar: str, tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(HomeinferError, match=r"^the grammar can't be read: [^\n]+$"):
        Sampler(Sampling(grammar=grammar), tokenizer)
    assert capfd.readouterr().err == ""


def two_likely(tokenizer: Tokenizer) -> Floats:
    row = np.zeros(tokenizer.n_vocab, np.float32)
    row[1000], row[2000] = 5.0, 4.9
    return row


@pytest.mark.parametrize(
    "penalty",
    [
        Sampling(temperature=0, repeat_penalty=1.5),
        Sampling(temperature=0, frequency_penalty=0.5),
        Sampling(temperature=0, presence_penalty=0.5),
    ],
    ids=["repeat", "frequency", "presence"],
)
def test_penalties_change_the_choice(penalty: Sampling, tokenizer: Tokenizer) -> None:
    row = two_likely(tokenizer)
    assert chosen(Sampling(temperature=0), tokenizer, [row, row]) == [1000, 1000]
    assert chosen(penalty, tokenizer, [row, row]) == [1000, 2000]


@pytest.mark.parametrize(("last_n", "choice"), [(64, 2000), (2, 1000), (0, 1000)])
def test_penalties_look_back_into_the_prompt(last_n: int, choice: int, tokenizer: Tokenizer) -> None:
    sampling = Sampling(temperature=0, repeat_penalty=1.5, repeat_last_n=last_n)
    with closing(Sampler(sampling, tokenizer)) as sampler:
        sampler.remember([1000, 7, 8])
        assert sampler.choose(two_likely(tokenizer)) == choice


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_refused(value: float, temperature: float, tokenizer: Tokenizer) -> None:
    row = two_likely(tokenizer)
    row[77] = value
    with pytest.raises(HomeinferError, match="the model's output is not a number"):
        chosen(Sampling(temperature=temperature), tokenizer, [row])


def test_a_row_without_any_possible_token_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(HomeinferError, match="the model's output is not a number"):
        chosen(Sampling(), tokenizer, [np.full(tokenizer.n_vocab, -np.inf, np.float32)])


def test_a_row_of_another_vocabulary_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(HomeinferError, match=rf"^32 logits for a vocabulary of {tokenizer.n_vocab} tokens$"):
        chosen(Sampling(), tokenizer, [np.zeros(32, np.float32)])


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0),
        Sampling(temperature=1.0, seed=5),
        Sampling(temperature=1.5, seed=6, top_k=0, repeat_penalty=1.4, frequency_penalty=0.5, repeat_last_n=7),
        Sampling(temperature=1.5, seed=7, grammar='root ::= (" "? [a-z]+)+'),
        Sampling(temperature=1.2, seed=8, top_k=1),
    ],
    ids=["greedy", "drawn", "penalties", "grammar", "one candidate"],
)
@pytest.mark.parametrize("told", [0, 1, 9])
def test_a_resumed_sampler_chooses_as_one_that_never_stopped(
    told: int, sampling: Sampling, tokenizer: Tokenizer, logits: list[Floats]
) -> None:
    prompt, rows = [5, 6, 7], [logits[i % len(logits)] for i in range(16)]

    def sampler() -> Sampler:
        made = Sampler(sampling, tokenizer)
        made.remember(prompt)
        return made

    with closing(sampler()) as whole, closing(sampler()) as resumed:
        expected = [whole.choose(row) for row in rows]
        resumed.resume(expected[:told])
        assert [resumed.choose(row) for row in rows[told:]] == expected[told:]


def test_an_answer_that_its_grammar_does_not_allow_is_not_resumed(tokenizer: Tokenizer) -> None:
    (digit,) = tokenizer.encode("7", special=False)
    with (
        closing(Sampler(Sampling(grammar="root ::= [a-z]+"), tokenizer)) as sampler,
        pytest.raises(HomeinferError, match="the grammar does not allow the answer that is to be resumed"),
    ):
        sampler.resume([digit])
