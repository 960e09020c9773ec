"""The token loop, over anything that is a Pipeline."""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from homeinfer.engine.pipeline import Batch, Floats, KvEdit, Pipeline, Remove, Shift
from homeinfer.engine.sampling import Sampler, Sampling
from homeinfer.engine.tokenizer import Tokenizer
from homeinfer.errors import HomeinferError

FinishReason = Literal["stop", "length", "cancelled"]


class Outcome(msgspec.Struct, frozen=True):
    """One finished answer. ttft_ms: from the call to the first token; tpot_ms: mean of the tokens after it
    (0.0 for fewer than two). reused: prompt tokens that were still in memory. shifted: tokens that left the
    context while the answer was written."""

    tokens: list[int]
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    reused: int
    shifted: int
    ttft_ms: float
    tpot_ms: float


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


class Generator:
    """Answers prompts on one sequence of a pipeline, keeping in memory what the next prompt shares."""

    def __init__(self, pipeline: Pipeline, tokenizer: Tokenizer, sequence: int = 0) -> None:
        self.pipeline = pipeline
        self.tokenizer = tokenizer
        self._sequence = sequence
        self._cached: list[int] = []
        self._is_stale = False

    def forget(self) -> None:
        """Let the next answer start from an empty memory. What is in it saw what came before it, so it must not
        serve a conversation in which that was never said."""
        self._is_stale = True

    def answer(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        limit: int = -1,
        *,
        keep: int = 0,
        on_text: Callable[[str], None] = lambda _text: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Outcome:
        """Write an answer of at most `limit` tokens (-1: until the model ends it, one context full at most).

        on_text gets each new piece of text, whole characters only; `cancelled` is asked between steps.
        A full context forgets the older half of what follows the first `keep` tokens where the model
        allows that, and ends the answer ("length") where it does not. Raises HomeinferError for a prompt
        that is empty or longer than the context, and when an engine fails.
        """
        self._check(prompt)
        limit = self.pipeline.n_ctx if limit < 0 else limit
        start = time.perf_counter()
        sampler = Sampler(sampling, self.tokenizer)
        try:
            sampler.remember(prompt)
            reuse = self._prepare(prompt)
            logits = self._prefill(prompt, reuse.kept, cancelled)
            writer = _Writer(self.tokenizer, on_text)
            reason, shifted, first = self._decode(logits, sampler, writer, limit, keep, cancelled)
        except BaseException:
            self.forget()  # how far the engines came is not known
            raise
        finally:
            sampler.close()
        end = time.perf_counter()
        n = len(writer.tokens)
        return Outcome(
            tokens=writer.tokens,
            text=writer.finish(),
            finish_reason=reason,
            prompt_tokens=len(prompt),
            reused=reuse.kept,
            shifted=shifted,
            ttft_ms=((first or end) - start) * 1e3,
            tpot_ms=(end - first) * 1e3 / (n - 1) if first and n > 1 else 0.0,
        )

    def _check(self, prompt: Sequence[int]) -> None:
        if not prompt:
            raise HomeinferError("the prompt is empty: there is nothing to answer")
        if len(prompt) >= self.pipeline.n_ctx:
            raise HomeinferError(
                f"the prompt has {len(prompt)} tokens, the context {self.pipeline.n_ctx}: "
                "shorten it or set a larger --ctx"
            )

    def _prepare(self, prompt: Sequence[int]) -> Reuse:
        if self._is_stale:
            self.pipeline.edit((Remove(self._sequence),))
            self._cached, self._is_stale = [], False
        reuse = plan_reuse(self._cached, prompt, self.pipeline.can_shift, self._sequence)
        if reuse.edits:
            self.pipeline.edit(reuse.edits)
        self._cached = list(prompt[: reuse.kept])
        return reuse

    def _prefill(self, prompt: Sequence[int], done: int, cancelled: Callable[[], bool]) -> Floats | None:
        logits = None
        for start in range(done, len(prompt), self.pipeline.n_batch):
            if cancelled():
                return None
            chunk = prompt[start : start + self.pipeline.n_batch]
            is_end = start + len(chunk) == len(prompt)
            rows = self._forward(chunk, last_only=is_end)
            logits = rows[0] if is_end else None
        return logits

    def _forward(self, tokens: Sequence[int], *, last_only: bool = True) -> Floats:
        batch = Batch.of(tokens, len(self._cached), self._sequence, last_only=last_only)
        self._cached.extend(tokens)
        return self.pipeline.forward(batch)

    def _decode(
        self,
        logits: Floats | None,
        sampler: Sampler,
        writer: _Writer,
        limit: int,
        keep: int,
        cancelled: Callable[[], bool],
    ) -> tuple[FinishReason, int, float | None]:
        first, shifted = None, 0
        while True:
            if logits is None or cancelled():
                return "cancelled", shifted, first
            if len(writer.tokens) >= limit:
                return "length", shifted, first
            token = sampler.choose(logits)
            first = first or time.perf_counter()
            if self.tokenizer.ends(token):
                return "stop", shifted, first
            writer.add(token)
            if len(writer.tokens) == limit:
                return "length", shifted, first
            if len(self._cached) >= self.pipeline.n_ctx:
                if not self.pipeline.can_shift or keep >= self.pipeline.n_ctx - 1:
                    return "length", shifted, first
                shifted += self._shift(keep)
            logits = self._forward([token])[0]

    def _shift(self, keep: int) -> int:
        edits, leave = plan_shift(len(self._cached), keep, self._sequence)
        self.pipeline.edit(edits)
        del self._cached[keep : keep + leave]
        return leave


class _Writer:
    """Tokens to text, holding back bytes of a character that is not whole yet."""

    def __init__(self, tokenizer: Tokenizer, on_text: Callable[[str], None]) -> None:
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._text: list[str] = []
        self.tokens: list[int] = []

    def add(self, token: int) -> None:
        self.tokens.append(token)
        self._emit(self._decoder.decode(self._tokenizer.piece(token)))

    def finish(self) -> str:
        self._emit(self._decoder.decode(b"", final=True))
        return "".join(self._text)

    def _emit(self, text: str) -> None:
        if text:
            self._text.append(text)
            self._on_text(text)
