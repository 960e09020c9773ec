"""How an answer that was interrupted goes on, when one is taken for stuck, and when it is given up. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from homeinfer.cluster.planning.report import PlanReport
from homeinfer.engine.request import Request

_TIMES_PREDICTED = 20.0
_LONGEST_SECONDS = 300.0
_MOST_TRIES = 3


def again(
    prompt: Sequence[int], told: Sequence[int], request: Request, session: str
) -> tuple[tuple[int, ...], Request]:
    """What to ask so that an answer goes on behind the tokens that were told."""
    return (*prompt, *told), msgspec.structs.replace(request, resumed=len(told), session=session)


def is_whole(told: Sequence[int], request: Request) -> bool:
    """Whether nothing is left to be written."""
    return len(told) >= request.limit


class Patience(msgspec.Struct, frozen=True):
    """What is predicted of a ring: milliseconds of a token behind so many others, and of each token of a prompt."""

    tpot_ms: float
    prompt_token_ms: float
    behind: int = 0

    @staticmethod
    def of(report: PlanReport) -> Patience:
        predicted, n = report.predicted, report.workload.prompt_tokens
        return Patience(predicted.tpot_ms, predicted.ttft_ms / max(n, 1), n)

    def seconds(self, least: float, prompt_tokens: int, answers: int, stalls: int) -> float:
        """How long nothing may be heard of an answer. prompt_tokens: of all prompts that are being read; stalls: how
        often this one was taken for stuck in a row, which may mean that it is just slow."""
        expected = (self.tpot_ms * max(answers, 1) + self.prompt_token_ms * prompt_tokens) / 1e3
        return float(min(max(least, _TIMES_PREDICTED * expected) * 2.0**stalls, _LONGEST_SECONDS))


def is_plain_step(number: int, behind: int, planned: int) -> bool:
    """Whether a token's step is one that the plan's prediction holds for. number: of the token since the ring was last
    asked, the first of which come with their prompt; behind: positions before it, with which attention grows."""
    return number > 0 and behind <= planned


class Failures(msgspec.Struct, frozen=True):
    """The failures of one answer since its last new token."""

    count: int = 0
    told: int = -1
    reason: str = ""


def after_failure(
    before: Failures, reason: str, told: int, *, has_begun: bool
) -> tuple[Failures, Literal["again", "anew", "give up"]]:
    """What to do when the ring could not go on with an answer: ask again, after another failure make the ring anew.

    Given up when it fails again and again at the same token; at once on the second time when nothing of it was ever
    computed, which is then the request's own fault (a grammar, say) and no reason to disturb others.
    """
    count = before.count + 1 if before.told == told else 1
    failures = Failures(count, told, reason)
    if count >= _MOST_TRIES or (count > 1 and not has_begun and reason == before.reason):
        return failures, "give up"
    return failures, "again" if count == 1 else "anew"
