"""The token loop, over anything that is a Pipeline: prompt tokens in, the answer's tokens out.

It runs in the engine process that holds the last window, so that logits stay where they are made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import msgspec

from homeinfer.engine.pipeline import Batch, Floats, KvEdit, Pipeline, Remove, Shift
from homeinfer.engine.sampling import Sampler, Sampling
from homeinfer.engine.tokenizer import Vocabulary

FinishReason = Literal["stop", "length", "cancelled"]


class Request(msgspec.Struct, frozen=True):
    """How to answer: at most `limit` tokens. A full context forgets the older half of what follows the first `keep`
    tokens. fresh: nothing that is in memory may serve. ends: the tokens that end an answer."""

    sampling: Sampling
    limit: Annotated[int, msgspec.Meta(ge=0)]
    keep: Annotated[int, msgspec.Meta(ge=0)] = 0
    fresh: bool = False
    ends: tuple[int, ...] = ()


class Finish(msgspec.Struct, frozen=True):
    """How an answer ended. reused: prompt tokens that were still in memory; shifted: tokens that left the context
    while it was written."""

    reason: FinishReason
    reused: int
    shifted: int


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
    head = _common(cached, prompt)
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


def _common(a: Sequence[int], b: Sequence[int]) -> int:
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
            return gap, _common(cached[head + gap :], prompt[head:])
    return 0, 0


def plan_shift(n_cached: int, n_keep: int, sequence: int = 0) -> tuple[tuple[KvEdit, ...], int]:
    """Make room in a full context: forget the older half of what follows the first n_keep tokens
    (llama.cpp's context shift). Returns the edits and how many tokens leave."""
    leave = max(1, (n_cached - n_keep) // 2)
    return (
        Remove(sequence, n_keep, n_keep + leave),
        Shift(sequence, n_keep + leave, n_cached, -leave),
    ), leave


class TokenLoop:
    """Answers prompts on one sequence of a pipeline, keeping in memory what the next prompt shares."""

    def __init__(self, pipeline: Pipeline, vocabulary: Vocabulary, sequence: int = 0) -> None:
        self._pipeline = pipeline
        self._vocabulary = vocabulary
        self._sequence = sequence
        self._cached: list[int] = []
        self._is_stale = False

    def forget(self) -> None:
        """Let the next answer start from an empty memory: what is in it is not known, or not to be used."""
        self._is_stale = True

    def run(
        self,
        prompt: Sequence[int],
        request: Request,
        on_token: Callable[[int], None],
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Finish:
        """Write an answer; on_token gets its tokens, and `cancelled` is asked between steps.

        Raises HomeinferError for a grammar that can't be read or followed, and when an engine fails.
        """
        if request.fresh and self._cached:
            self.forget()
        sampler = Sampler(request.sampling, self._vocabulary)
        try:
            sampler.remember(prompt)
            reuse = self._prepare(prompt)
            logits = self._prefill(prompt, reuse.kept, cancelled)
            reason, shifted = self._decode(logits, sampler, request, on_token, cancelled)
        except BaseException:
            self.forget()  # how far the engines came is not known
            raise
        finally:
            sampler.close()
        return Finish(reason, reuse.kept, shifted)

    def _prepare(self, prompt: Sequence[int]) -> Reuse:
        if self._is_stale:
            self._pipeline.edit((Remove(self._sequence),))
            self._cached, self._is_stale = [], False
        reuse = plan_reuse(self._cached, prompt, self._pipeline.can_shift, self._sequence)
        if reuse.edits:
            self._pipeline.edit(reuse.edits)
        self._cached = list(prompt[: reuse.kept])
        return reuse

    def _prefill(self, prompt: Sequence[int], done: int, cancelled: Callable[[], bool]) -> Floats | None:
        logits = None
        for start in range(done, len(prompt), self._pipeline.n_batch):
            if cancelled():
                return None
            chunk = prompt[start : start + self._pipeline.n_batch]
            is_end = start + len(chunk) == len(prompt)
            rows = self._forward(chunk, last_only=is_end)
            logits = rows[0] if is_end else None
        return logits

    def _forward(self, tokens: Sequence[int], *, last_only: bool = True) -> Floats:
        batch = Batch.of(tokens, len(self._cached), self._sequence, last_only=last_only)
        self._cached.extend(tokens)
        return self._pipeline.forward(batch)

    def _decode(
        self,
        logits: Floats | None,
        sampler: Sampler,
        request: Request,
        on_token: Callable[[int], None],
        cancelled: Callable[[], bool],
    ) -> tuple[FinishReason, int]:
        written, shifted = 0, 0
        while True:
            if logits is None or cancelled():
                return "cancelled", shifted
            if written >= request.limit:
                return "length", shifted
            token = sampler.choose(logits)
            if token in request.ends:
                return "stop", shifted
            on_token(token)
            written += 1
            if written == request.limit:
                return "length", shifted
            if len(self._cached) >= self._pipeline.n_ctx:
                if not self._pipeline.can_shift or request.keep >= self._pipeline.n_ctx - 1:
                    return "length", shifted
                shifted += self._shift(request.keep)
            logits = self._forward([token])[0]

    def _shift(self, keep: int) -> int:
        edits, leave = plan_shift(len(self._cached), keep, self._sequence)
        self._pipeline.edit(edits)
        del self._cached[keep : keep + leave]
        return leave
