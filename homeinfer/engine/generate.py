"""What an answer is: how it is asked for, how it ends, and what of a memory serves it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from homeinfer.engine.edits import KvEdit, Remove, Shift
from homeinfer.engine.request import Request
from homeinfer.errors import HomeinferError

MOST_REPLAYED = 1024
"""Tokens of a resumed answer that go one by one where steps cost little (scheduler.Limits.replay)."""


class Reuse(msgspec.Struct, frozen=True):
    """What of a memory serves a new prompt: apply `edits`, then run the prompt from token `kept` on."""

    edits: tuple[KvEdit, ...]
    kept: int


def plan_reuse(cached: Sequence[int], prompt: Sequence[int], can_edit: bool, sequence: int = 0) -> Reuse:
    """Keep the longest common beginning, and where the prompt left out a stretch of the memory's middle
    (old turns of a chat), keep what follows it too, moved forward.

    The prompt's last token is always run, for its logits. Memories that can't be edited in part
    (can_edit False: recurrent ones) are kept only where the prompt continues them, else emptied.
    """
    head = common_start(cached, prompt)
    if not can_edit:
        if head == len(cached) < len(prompt):
            return Reuse((), head)
        return Reuse((Remove(sequence),), 0) if cached else Reuse((), 0)
    gap, tail = _moved_tail(cached, prompt, head)
    if tail:
        kept = min(head + tail, len(prompt) - 1)
        end = head + gap + tail
        edits: list[KvEdit] = [Remove(sequence, head, head + gap), Shift(sequence, head + gap, end, -gap)]
        if end < len(cached):
            edits.insert(0, Remove(sequence, end))
        if kept < head + tail:
            edits.append(Remove(sequence, kept))
        return Reuse(tuple(edits), kept)
    kept = min(head, len(prompt) - 1)
    return Reuse((Remove(sequence, kept),) if kept < len(cached) else (), kept)


def common_start(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


def _moved_tail(cached: Sequence[int], prompt: Sequence[int], head: int, least: int = 16) -> tuple[int, int]:
    """(gap, length): the first gap after which at least `least` tokens of the memory go on as the prompt does."""
    probe = list(prompt[head : head + least])
    if len(probe) < least:
        return 0, 0
    for gap in range(1, len(cached) - head - least + 1):
        if cached[head + gap] == probe[0] and list(cached[head + gap : head + gap + least]) == probe:
            return gap, common_start(cached[head + gap :], prompt[head:])
    return 0, 0


def plan_shift(n_cached: int, n_keep: int, sequence: int = 0) -> tuple[tuple[KvEdit, ...], int]:
    """Make room in a full context: forget the older half of what follows the first n_keep tokens
    (llama.cpp's context shift). Returns the edits and how many tokens leave."""
    leave = max(1, (n_cached - n_keep) // 2)
    return (
        Remove(sequence, n_keep, n_keep + leave),
        Shift(sequence, n_keep + leave, n_cached, -leave),
    ), leave


def plan_prefix(cached: Sequence[int], prompt: Sequence[int], can_edit: bool, most: int, sequence: int = 0) -> Reuse:
    """What of another conversation's memory serves a prompt: the beginning that both share, `most` tokens of it."""
    head = min(common_start(cached, prompt), most, len(prompt) - 1)
    if head == len(cached):
        return Reuse((), head)
    return Reuse((Remove(sequence, head),), head) if can_edit else Reuse((Remove(sequence),), 0)


def resumed_context(prompt: Sequence[int], request: Request, n_ctx: int, can_shift: bool) -> tuple[list[int], int]:
    """The tokens that were in the context when a resumed answer was interrupted, and how many had left it.

    Raises HomeinferError for a prompt that is empty or does not fit the context.
    """
    n = len(prompt) - request.resumed
    if not 0 < n < n_ctx:
        raise HomeinferError(f"a prompt of {n} tokens does not fit a context of {n_ctx}")
    context, shifted = list(prompt[:n]), 0
    for token in prompt[n:]:
        if len(context) >= n_ctx:
            if not makes_room(request, n_ctx, can_shift):
                raise HomeinferError(f"an answer of {request.resumed} tokens does not fit a context of {n_ctx}")
            _, leave = plan_shift(len(context), request.keep)
            del context[request.keep : request.keep + leave]
            shifted += leave
        context.append(token)
    return context, shifted


def makes_room(request: Request, n_ctx: int, can_shift: bool) -> bool:
    """Whether a full context can forget a part of it."""
    return can_shift and request.keep < n_ctx - 1
