"""One answer as its client sees it: what came, what is missing, what to send next. Pure."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import msgspec

from homeinfer.cluster.wire.client import AnswerDone, AnswerFailed, AskAnswer, Resume, ToClient, Tokens, Unknown
from homeinfer.engine.request import Finish, Request
from homeinfer.errors import HomeinferError


def new_id() -> str:
    """For an answer or a session."""
    return secrets.token_hex(16)


class Taken(msgspec.Struct, frozen=True):
    """What a message brought: new tokens, the end, or something to send."""

    tokens: tuple[int, ...] = ()
    finish: Finish | None = None
    send: AskAnswer | Resume | None = None


_NOTHING = Taken()


class Telling:
    """An answer that is being told. A token counts once, however often the cluster tells it."""

    def __init__(self, session: str, prompt: Sequence[int], request: Request) -> None:
        self._ask = AskAnswer(new_id(), session, tuple(prompt), request)
        self._told: list[int] = []

    @property
    def id(self) -> str:
        return self._ask.id

    @property
    def have(self) -> int:
        """Tokens so far."""
        return len(self._told)

    def ask(self) -> AskAnswer:
        """The first message of all."""
        return self._ask

    def resume(self) -> Resume:
        """For after a silence: the coordinator may have been another process meanwhile."""
        return Resume(self._ask.id, self.have)

    def take(self, message: ToClient) -> Taken:
        """Raises HomeinferError when the cluster can't write the answer."""
        if getattr(message, "id", None) != self._ask.id:
            return _NOTHING
        if isinstance(message, Tokens):
            return self._take_tokens(message)
        if isinstance(message, AnswerDone):
            return Taken(finish=message.finish) if message.n_tokens <= self.have else Taken(send=self.resume())
        if isinstance(message, AnswerFailed):
            raise HomeinferError(message.reason)
        if isinstance(message, Unknown):
            return Taken(send=self._ask_again())
        return _NOTHING

    def _take_tokens(self, message: Tokens) -> Taken:
        if message.start > self.have:
            return Taken(send=self.resume())
        new = message.tokens[self.have - message.start :]
        self._told += new
        return Taken(tokens=new)

    def _ask_again(self) -> AskAnswer:
        """The coordinator lost the answer, or never got it: the same prompt again, then what was told already.

        The seed is the same, so the tokens will be; those that were told are skipped as they come.
        """
        return self._ask
