"""A conversation with a model: its history, what of it fits the context, and its file."""

from __future__ import annotations

import contextlib
import os
import tempfile
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import cycle, takewhile
from pathlib import Path

import msgspec

from homeinfer.chat.template import ChatMessage, ChatTemplate
from homeinfer.engine.answers import Generator, Outcome
from homeinfer.engine.device_info import DeviceInfo
from homeinfer.engine.request import Sampling
from homeinfer.errors import HomeinferError

_VERSION = 1
_MOST_BYTES = 64 << 20


class AnswerFailed(HomeinferError):
    """An engine could not go on with an answer: the conversation can be saved but not continued."""


class Turn(msgspec.Struct, frozen=True):
    """One answer. dropped: messages that left the context for this turn and stay in the history."""

    text: str
    outcome: Outcome
    dropped: int


class Stats(msgspec.Struct, frozen=True):
    """What a session did so far. Sums over all answers, but for the last one's TTFT; tokens_per_second is the
    mean decode rate, 0.0 before there is one. context_used of n_ctx: tokens."""

    answers: int
    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    tokens_per_second: float
    last_ttft_ms: float
    context_used: int
    n_ctx: int
    devices: tuple[DeviceInfo, ...]


class Conversation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file that a conversation is saved as. model: what it was held with, for the reader."""

    version: int
    model: str
    messages: tuple[ChatMessage, ...]


class _Versioned(msgspec.Struct):
    version: int


class Session:
    """Asks a generator, which it has to itself, remembering what was said.

    `limit`: most tokens of an answer, -1 for no limit. Answers take the seeds that follow sampling.seed, one
    each, so that asking again gives another answer and the same conversation the same ones.
    """

    def __init__(
        self,
        model: str,
        template: ChatTemplate,
        generator: Generator,
        sampling: Sampling,
        *,
        limit: int = -1,
        system: str | None = None,
    ) -> None:
        """Raises HomeinferError for a system message that does not fit the context."""
        self.model = model
        self.messages: tuple[ChatMessage, ...] = ()
        self.context_used = 0
        self.last: Outcome | None = None
        self._template = template
        self._generator = generator
        self._sampling = sampling
        self._limit = limit
        self._left = 0
        self._answers = self._prompt_tokens = self._reused = self._generated = 0
        self._decoded, self._decode_ms = 0, 0.0
        if system:
            self.set_system(system)

    @property
    def n_ctx(self) -> int:
        """Tokens that the context holds."""
        return self._generator.teller.n_ctx

    @property
    def system(self) -> str | None:
        """The system message, if there is one."""
        return self.messages[0].content if self.messages and self.messages[0].role == "system" else None

    def ask(
        self,
        text: str,
        on_text: Callable[[str], None] = lambda _text: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Turn:
        """Answer a message and remember both; an answer that was stopped counts as far as it was written, and
        a message without any answer not at all.

        Raises HomeinferError, leaving the history as it was, for a message that is empty, longer than the
        context or refused by the template; AnswerFailed when an engine can't go on.
        """
        text = _whole_characters(text)
        if not text.strip():
            raise HomeinferError("the message is empty: there is nothing to answer")
        asked = (*self.messages, ChatMessage("user", text))
        left, prompt = self._prompt(asked)
        keep = self._beginning(prompt)
        written: list[str] = []

        def write(piece: str) -> None:
            written.append(piece)
            on_text(piece)

        seed = (self._sampling.seed + self._answers) % (1 << 32)
        sampling = msgspec.structs.replace(self._sampling, seed=seed)
        try:
            outcome = self._generator.answer(
                prompt, sampling, self._limit, keep=keep, on_text=write, cancelled=cancelled
            )
        except HomeinferError as problem:
            raise AnswerFailed(str(problem)) from problem
        finally:
            if written:
                self.messages = (*asked, ChatMessage("assistant", "".join(written)))
        dropped, self._left = max(0, left - self._left), left
        self._count(outcome)
        return Turn(outcome.text, outcome, dropped)

    def _prompt(self, messages: tuple[ChatMessage, ...]) -> tuple[int, list[int]]:
        """How many messages leave the context for the next answer, and its prompt. Raises HomeinferError."""
        room = self.n_ctx - reserve(self.n_ctx)
        left = fit(messages, lambda some: len(self._template.tokens(some)), room)
        prompt = self._template.tokens(without_oldest(messages, left))
        if len(prompt) >= self.n_ctx:
            raise HomeinferError(
                f"the message takes {len(prompt):,} tokens with what must stand before it, the context holds "
                f"{self.n_ctx:,}: shorten it or {self._generator.longer}"
            )
        return left, prompt

    def _beginning(self, prompt: Sequence[int]) -> int:
        """How many of a prompt's tokens stand before any user's words: the system message, as rendered."""
        system = self.messages[:1] if self.system is not None else ()
        others = [self._template.tokens((*system, ChatMessage("user", text))) for text in ("a", "0")]
        columns = zip(prompt, *others, strict=False)
        return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))

    def _count(self, outcome: Outcome) -> None:
        self.last = outcome
        self.context_used = min(self.n_ctx, outcome.prompt_tokens + len(outcome.tokens) - outcome.shifted)
        self._answers += 1
        self._prompt_tokens += outcome.prompt_tokens
        self._reused += outcome.reused
        self._generated += len(outcome.tokens)
        if outcome.tpot_ms:
            self._decoded += len(outcome.tokens) - 1
            self._decode_ms += outcome.tpot_ms * (len(outcome.tokens) - 1)

    def clear(self) -> None:
        """Forget all that was said; the system message stays."""
        self._replace(self.messages[:1] if self.system is not None else ())

    def set_system(self, text: str | None) -> None:
        """Set the system message, or with None take it away; what was said stays.

        Raises HomeinferError, changing nothing, for one that leaves no room in the context.
        """
        said = self.messages[1:] if self.system is not None else self.messages
        system = () if text is None else (ChatMessage("system", _whole_characters(text)),)
        n = len(self._template.tokens((*system, ChatMessage("user", "a"))))
        if n > self.n_ctx - reserve(self.n_ctx):
            raise HomeinferError(
                f"the system message takes {n:,} tokens, the context holds {self.n_ctx:,}: "
                f"shorten it or {self._generator.longer}"
            )
        self._replace((*system, *said))

    def save(self, path: Path) -> None:
        """Write the conversation to a file. Raises HomeinferError; see save_conversation."""
        save_conversation(Conversation(_VERSION, self.model, self.messages), path)

    def load(self, path: Path) -> Conversation:
        """Go on with a saved conversation instead of this one.

        Raises HomeinferError, changing nothing; see load_conversation.
        """
        loaded = load_conversation(path)
        self._replace(loaded.messages)
        return loaded

    def _replace(self, messages: tuple[ChatMessage, ...]) -> None:
        used = left = 0
        if any(m.role != "system" for m in messages):
            # as if the next message were nearly nothing: what it will really leave out is asked again then
            left, prompt = self._prompt((*messages, ChatMessage("user", "a")))
            used = len(prompt)
        self.messages, self.context_used, self._left, self.last = messages, used, left, None
        self._generator.forget()

    @property
    def stats(self) -> Stats:
        """What happened since the start."""
        return Stats(
            answers=self._answers,
            prompt_tokens=self._prompt_tokens,
            reused_tokens=self._reused,
            generated_tokens=self._generated,
            tokens_per_second=1e3 * self._decoded / self._decode_ms if self._decode_ms else 0.0,
            last_ttft_ms=self.last.ttft_ms if self.last else 0.0,
            context_used=self.context_used,
            n_ctx=self.n_ctx,
            devices=self._generator.teller.devices,
        )


def reserve(n_ctx: int) -> int:
    """Tokens of a context that the history leaves to the answer."""
    return min(n_ctx // 4, 512)


def fit(messages: Sequence[ChatMessage], count: Callable[[Sequence[ChatMessage]], int], room: int) -> int:
    """How many of the oldest messages must go so that the prompt takes at most `room` tokens as `count` counts.

    Whole pairs of question and answer, never the system message nor the last one, so the rest may still be
    too long. `messages` ends with the user's.
    """
    if count(messages) <= room:
        return 0
    pairs = (len(messages) - _first_said(messages) - 1) // 2
    fewest = bisect_left(range(pairs), True, key=lambda n: count(without_oldest(messages, 2 * n)) <= room)
    return 2 * fewest


def without_oldest(messages: Sequence[ChatMessage], n: int) -> tuple[ChatMessage, ...]:
    """The conversation without the n oldest messages that follow the system message."""
    first = _first_said(messages)
    return (*messages[:first], *messages[first + n :])


def _first_said(messages: Sequence[ChatMessage]) -> int:
    return 1 if messages and messages[0].role == "system" else 0


def _whole_characters(text: str) -> str:
    """Bytes that were no UTF-8 when they were read, as replacement characters."""
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def save_conversation(conversation: Conversation, path: Path) -> None:
    """Write a conversation as JSON that only the user can read, whole or not at all.

    Raises HomeinferError when it can't be written, or when the path is something else's already.
    """
    path = path.expanduser().resolve()
    if path.exists():
        try:
            load_conversation(path)
        except HomeinferError:
            raise HomeinferError(f"{path} exists and is no saved conversation: choose another name") from None
    data = msgspec.json.format(msgspec.json.encode(conversation), indent=2)
    try:
        _write_whole(path, data + b"\n")
    except OSError as problem:
        raise HomeinferError(f"{path} can't be written: {problem.strerror}") from problem


def _write_whole(path: Path, data: bytes) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise


def load_conversation(path: Path) -> Conversation:
    """Read what save_conversation wrote. Raises HomeinferError for a file that is missing, too large, no JSON,
    of another version, or no conversation whose roles alternate and end with an answer."""
    path = path.expanduser()
    data = _read(path)
    try:
        version = msgspec.json.decode(data, type=_Versioned).version
        if version != _VERSION:
            raise HomeinferError(f"{path} is a conversation of version {version}, this homeinfer reads {_VERSION}")
        conversation = msgspec.json.decode(data, type=Conversation)
    except msgspec.ValidationError as problem:
        raise HomeinferError(f"{path} is no saved conversation: {problem}") from problem
    except (msgspec.DecodeError, UnicodeDecodeError) as problem:
        raise HomeinferError(f"{path} is no saved conversation: it is not JSON ({problem})") from problem
    _check_roles(conversation.messages, path)
    return conversation


def _read(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise HomeinferError(f"{path} is not a file")
        if path.stat().st_size > _MOST_BYTES:
            raise HomeinferError(f"{path} is no saved conversation: it is larger than {_MOST_BYTES >> 20} MiB")
        return path.read_bytes()
    except OSError as problem:
        raise HomeinferError(f"{path} can't be read: {problem.strerror}") from problem


def _check_roles(messages: Sequence[ChatMessage], path: Path) -> None:
    said = messages[_first_said(messages) :]
    for n, (message, role) in enumerate(zip(said, cycle(("user", "assistant")), strict=False), start=1):
        if message.role != role:
            raise HomeinferError(
                f"{path} is no saved conversation: message {n} is the {message.role}'s, not the {role}'s"
            )
    if len(said) % 2:
        raise HomeinferError(f"{path} is no saved conversation: the last message has no answer")
