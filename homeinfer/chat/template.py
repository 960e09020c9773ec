"""A conversation as the prompt its model was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from homeinfer.engine import runtime
from homeinfer.engine.tokenizer import Tokenizer
from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header

_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class ChatMessage(msgspec.Struct, frozen=True):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class ChatTemplate:
    """The model's own chat template (`tokenizer.chat_template`), ChatML for a model without.

    Templates come with model files, so they run in Jinja's sandbox (llama-cpp-python's Jinja2ChatFormatter).
    """

    def __init__(self, header: Header, tokenizer: Tokenizer) -> None:
        """Raises HomeinferError for a template that can't be read."""
        runtime.llama()
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        text = header.get("tokenizer.chat_template")
        self.is_own = isinstance(text, str)
        self._tokenizer = tokenizer
        try:
            self._format = Jinja2ChatFormatter(text if self.is_own else _CHATML, tokenizer.eos, tokenizer.bos)
        except Exception as problem:  # jinja2 raises its own kinds, and whatever the template does
            raise HomeinferError(f"the model's chat template can't be read ({_line(problem)}): use --raw") from problem

    def tokens(self, messages: Sequence[ChatMessage]) -> list[int]:
        """The prompt for the next answer. A system message goes into the first user message where the
        template takes none. Raises HomeinferError for a conversation that the template refuses."""
        try:
            text = self.render(messages)
        except Exception:  # again with the system message merged, as Gemma's template needs
            try:
                text = self.render(merge_system(messages))
            except Exception as problem:
                raise HomeinferError(f"the model's chat template refuses this: {_line(problem)}") from problem
        return self._tokenizer.prompt(text)

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """The prompt for the next answer as text; raises what the template does where it refuses."""
        plain = [{"role": m.role, "content": m.content} for m in messages]
        return str(self._format(messages=plain).prompt)  # type: ignore[arg-type]


def merge_system(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """The same conversation without a system message: its text begins the first user message."""
    system = "\n\n".join(m.content for m in messages if m.role == "system")
    rest = [m for m in messages if m.role != "system"]
    if system and rest and rest[0].role == "user":
        rest[0] = ChatMessage("user", f"{system}\n\n{rest[0].content}")
    return rest


def _line(problem: Exception) -> str:
    return " ".join(str(problem).split())[:200] or type(problem).__name__
