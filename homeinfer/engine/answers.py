"""Text in front of a token loop, wherever that runs."""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from homeinfer.engine.device_info import DeviceInfo
from homeinfer.engine.request import Finish, FinishReason, Request, Sampling
from homeinfer.engine.tokenizer import Tokenizer
from homeinfer.errors import HomeinferError


class Teller(Protocol):
    """A model that answers prompts, wherever its layers and its token loop are."""

    @property
    def n_ctx(self) -> int:
        """Positions one sequence may have."""
        ...

    @property
    def devices(self) -> tuple[DeviceInfo, ...]: ...

    def tell(
        self,
        prompt: Sequence[int],
        request: Request,
        on_token: Callable[[int], None],
        cancelled: Callable[[], bool],
    ) -> Finish:
        """Write an answer, a token at a time. Raises HomeinferError when an engine fails."""
        ...

    def close(self) -> None: ...


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


class Generator:
    """Answers of one model as text. longer: what a user does for a longer context."""

    def __init__(self, teller: Teller, tokenizer: Tokenizer, longer: str = "set a larger --ctx") -> None:
        self.teller = teller
        self.tokenizer = tokenizer
        self.longer = longer
        self._is_fresh = True

    def forget(self) -> None:
        """Let the next answer start from an empty memory. What is in it saw what came before it, so it must not
        serve a conversation in which that was never said."""
        self._is_fresh = True

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
        writer = _Writer(self.tokenizer, on_text)
        limit = self.teller.n_ctx if limit < 0 else limit
        request = Request(sampling, limit, keep, self._is_fresh, self.tokenizer.end_tokens)
        start = time.perf_counter()
        self._is_fresh = True
        finish = self.teller.tell(prompt, request, writer.add, cancelled)
        end, first, n = time.perf_counter(), writer.first_time, len(writer.tokens)
        self._is_fresh = False
        return Outcome(
            tokens=writer.tokens,
            text=writer.finish(),
            finish_reason=finish.reason,
            prompt_tokens=len(prompt),
            reused=finish.reused,
            shifted=finish.shifted,
            ttft_ms=((first or end) - start) * 1e3,
            tpot_ms=(writer.last_time - first) * 1e3 / (n - 1) if first and n > 1 else 0.0,
        )

    def _check(self, prompt: Sequence[int]) -> None:
        if not prompt:
            raise HomeinferError("the prompt is empty: there is nothing to answer")
        if len(prompt) >= self.teller.n_ctx:
            raise HomeinferError(
                f"the prompt has {len(prompt)} tokens, the context {self.teller.n_ctx}: shorten it or {self.longer}"
            )


class _Writer:
    """Tokens to text, holding back bytes of a character that is not whole yet."""

    def __init__(self, tokenizer: Tokenizer, on_text: Callable[[str], None]) -> None:
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._text: list[str] = []
        self.tokens: list[int] = []
        self.first_time: float | None = None
        self.last_time = 0.0

    def add(self, token: int) -> None:
        self.last_time = time.perf_counter()
        self.first_time = self.first_time or self.last_time
        self.tokens.append(token)
        self._emit(self._decoder.decode(self._tokenizer.piece(token)))

    def finish(self) -> str:
        self._emit(self._decoder.decode(b"", final=True))
        return "".join(self._text)

    def _emit(self, text: str) -> None:
        if text:
            self._text.append(text)
            self._on_text(text)
