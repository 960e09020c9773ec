"""How an answer is asked for, and how it ends. Needs little memory: an idle agent imports it."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

FinishReason = Literal["stop", "length", "cancelled"]


class Sampling(msgspec.Struct, frozen=True):
    """How tokens are chosen; llama.cpp's defaults. temperature 0: always the likeliest.

    The same seed gives the same text however many devices there are: choosing happens once, on the head. Each token
    takes one number of the seed's, so that an answer can go on elsewhere.
    """

    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] = 0.8
    top_k: Annotated[int, msgspec.Meta(ge=0)] = 40
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.95
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.05
    repeat_penalty: Annotated[float, msgspec.Meta(gt=0, le=10)] = 1.0
    repeat_last_n: Annotated[int, msgspec.Meta(ge=0)] = 64
    frequency_penalty: Annotated[float, msgspec.Meta(ge=-10, le=10)] = 0.0
    presence_penalty: Annotated[float, msgspec.Meta(ge=-10, le=10)] = 0.0
    seed: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)] = 0
    grammar: str | None = None


class Request(msgspec.Struct, frozen=True):
    """How to answer: at most `limit` tokens. A full context forgets the older half of what follows the first `keep`
    tokens. fresh: nothing that is in memory may serve. ends: the tokens that end an answer.

    resumed: the last so many tokens of the prompt are the answer's own, told before the ring was made anew: they
    count for `limit`, and the answer goes on as if it had never stopped. session: answers of one conversation share
    it, and find each other's memory first.
    """

    sampling: Sampling
    limit: Annotated[int, msgspec.Meta(ge=0)]
    keep: Annotated[int, msgspec.Meta(ge=0)] = 0
    fresh: bool = False
    ends: tuple[int, ...] = ()
    resumed: Annotated[int, msgspec.Meta(ge=0)] = 0
    session: Annotated[str, msgspec.Meta(max_length=64)] = ""


class Finish(msgspec.Struct, frozen=True):
    """How an answer ended. reused: prompt tokens that were still in memory; shifted: tokens that left the context
    while it was written."""

    reason: FinishReason
    reused: int
    shifted: int
