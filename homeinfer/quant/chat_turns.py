"""What a model's chat template puts around the turns of a conversation, as tokens."""

from __future__ import annotations

from typing import NamedTuple

from homeinfer.chat.template import ChatMessage, ChatTemplate
from homeinfer.engine.tokenizer import Tokenizer
from homeinfer.model.header import Header

_MARKS = ("homeinferquestion", "homeinferanswer", "homeinferagain")
"""Words that no template takes apart or mentions itself."""


class Turns(NamedTuple):
    """Token ids: what stands before a first question, between it and its answer, and between an answer and the next
    question (nothing where the template takes no second question)."""

    start: tuple[int, ...]
    answer: tuple[int, ...]
    again: tuple[int, ...]


def find_turns(header: Header, tokenizer: Tokenizer) -> Turns | None:
    """The turns of the model's own template, found by rendering it with marks for what is said.

    None for a model without a template, and for one whose template can't be rendered or changes what is said.
    """
    if not isinstance(header.get("tokenizer.chat_template"), str):
        return None
    try:
        template = ChatTemplate(header, tokenizer)
        start, answer = _around(template.render([ChatMessage("user", _MARKS[0])]), 1)
        turns = Turns(tuple(tokenizer.prompt(start)), _tokens(tokenizer, answer), _again(template, tokenizer))
    except Exception:  # templates come with models and raise whatever they like
        return None
    return turns if turns.start and turns.answer else None


def _again(template: ChatTemplate, tokenizer: Tokenizer) -> tuple[int, ...]:
    question, answer, again = _MARKS
    messages = [ChatMessage("user", question), ChatMessage("assistant", answer), ChatMessage("user", again)]
    try:
        return _tokens(tokenizer, _around(template.render(messages), 3)[2])
    except Exception:
        return ()


def _around(text: str, marks: int) -> list[str]:
    """The texts around the first marks; ValueError unless each is there once, in order."""
    parts = []
    for mark in _MARKS[:marks]:
        before, text = text.split(mark)
        parts.append(before)
    return [*parts, text]


def _tokens(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, special=False))
