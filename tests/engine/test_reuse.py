"""What plan_reuse and plan_shift do to a memory, on a memory that is a list."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hypothesis import example, given
from hypothesis import strategies as st

from homeinfer.engine.edits import Copy, Keep, KvEdit, Remove, Shift
from homeinfer.engine.generate import plan_reuse, plan_shift

Cell = tuple[int, int]
"""(position, token)"""

few = st.integers(0, 2)
tokens = st.lists(few, max_size=60)
words = st.lists(st.integers(0, 50), max_size=40)


def memory_of(cached: Sequence[int]) -> list[Cell]:
    return list(enumerate(cached))


def edited(memory: list[Cell], edits: Iterable[KvEdit]) -> list[Cell]:
    """The memory after llama_memory_seq_rm and llama_memory_seq_add, as llama.cpp describes them."""
    for edit in edits:
        match edit:
            case Remove(0, start, end):
                memory = [(p, t) for p, t in memory if not (start <= p and (end < 0 or p < end))]
            case Shift(0, start, end, delta):
                memory = [(p + delta if start <= p < end else p, t) for p, t in memory]
            case Remove() | Shift() | Keep() | Copy():
                raise AssertionError(f"an edit of another sequence or kind: {edit}")
        positions = [p for p, _ in memory]
        assert len(set(positions)) == len(positions), "two tokens at one position"
        assert all(p >= 0 for p in positions)
    return memory


def check_reuse(cached: Sequence[int], prompt: Sequence[int], *, can_edit: bool) -> int:
    """The memory must hold exactly the prompt once the rest of it has been run; gives the tokens kept."""
    reuse = plan_reuse(cached, prompt, can_edit)
    memory = edited(memory_of(cached), reuse.edits)
    assert memory == memory_of(prompt[: reuse.kept])
    assert 0 <= reuse.kept < len(prompt)
    return reuse.kept


@given(tokens, tokens.filter(bool))
@example([1], [1])
@example([1, 2, 0], [1])
@example([1, 2] * 20, [1, 2] * 19)
def test_any_memory_becomes_the_prompt(cached: list[int], prompt: list[int]) -> None:
    check_reuse(cached, prompt, can_edit=True)


@given(words, words, words, words, words)
def test_a_memory_whose_middle_was_left_out_becomes_the_prompt(
    head: list[int], gap: list[int], tail: list[int], cached_end: list[int], prompt_end: list[int]
) -> None:
    check_reuse(head + gap + tail + cached_end, [*head, *tail, *prompt_end, 7], can_edit=True)


@given(words, words, st.lists(st.integers(0, 50), min_size=16, max_size=40), words)
@example([1], [2], [*range(20)], [])
def test_what_follows_the_left_out_middle_is_kept_too(
    head: list[int], gap: list[int], tail: list[int], prompt_end: list[int]
) -> None:
    marked_gap = [n + 100 for n in gap]
    prompt = [*head, *tail, *(n + 200 for n in prompt_end)]
    kept = check_reuse([*head, *marked_gap, *tail], prompt, can_edit=True)
    assert kept == min(len(head) + len(tail), len(prompt) - 1)


@given(tokens, tokens.filter(bool))
def test_the_common_beginning_is_always_kept(cached: list[int], prompt: list[int]) -> None:
    common = next((n for n, (a, b) in enumerate(zip(cached, prompt, strict=False)) if a != b), None)
    least = min(len(cached), len(prompt)) if common is None else common
    assert plan_reuse(cached, prompt, can_edit=True).kept >= min(least, len(prompt) - 1)


@given(tokens, tokens.filter(bool))
def test_a_memory_that_can_not_be_edited_is_continued_or_emptied(cached: list[int], prompt: list[int]) -> None:
    kept = check_reuse(cached, prompt, can_edit=False)
    assert kept in (0, len(cached))
    assert all(edit == Remove(0) for edit in plan_reuse(cached, prompt, can_edit=False).edits)


@given(tokens, words)
def test_a_memory_that_can_not_be_edited_goes_on_with_a_prompt_that_continues_it(
    cached: list[int], more: list[int]
) -> None:
    assert check_reuse(cached, [*cached, *more, 7], can_edit=False) == len(cached)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=80), st.data())
def test_a_shift_keeps_the_beginning_and_the_newest(cached: list[int], data: st.DataObject) -> None:
    n_keep = data.draw(st.integers(0, len(cached) - 1))
    edits, leave = plan_shift(len(cached), n_keep)
    assert 1 <= leave <= len(cached) - n_keep
    assert edited(memory_of(cached), edits) == memory_of(cached[:n_keep] + cached[n_keep + leave :])
    assert leave <= max(1, (len(cached) - n_keep) // 2)
