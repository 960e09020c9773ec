from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from homeinfer.chat.template import ChatMessage, ChatTemplate, merge_system
from homeinfer.cli.default_model import default_model
from homeinfer.engine.tokenizer import Tokenizer
from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header, MetaValue, ValueType, read_header

KEY = "tokenizer.chat_template"
SYSTEM = ChatMessage("system", "Be brief.")
USER = ChatMessage("user", "Hello")
TALK = [USER, ChatMessage("assistant", "Hi!"), ChatMessage("user", "Bye")]

NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
)


@pytest.fixture(scope="module")
def header() -> Header:
    return read_header(default_model())


@pytest.fixture(scope="module")
def tokenizer(header: Header) -> Iterator[Tokenizer]:
    loaded = Tokenizer(header.files[0].path)
    yield loaded
    loaded.close()


def with_template(header: Header, text: str) -> Header:
    return msgspec.structs.replace(header, metadata=header.metadata | {KEY: MetaValue(ValueType.STRING, text)})


def read_back(tokenizer: Tokenizer, ids: list[int]) -> str:
    return b"".join(tokenizer.piece(token, special=True) for token in ids).decode()


def test_the_models_own_template_is_used(header: Header, tokenizer: Tokenizer) -> None:
    template = ChatTemplate(header, tokenizer)
    assert template.is_own
    assert read_back(tokenizer, template.tokens([SYSTEM, *TALK])) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_tokens_are_those_of_llama_cpp_pythons_chat(header: Header, tokenizer: Tokenizer) -> None:
    formatter = Jinja2ChatFormatter(header.get(KEY), tokenizer.eos, tokenizer.bos)
    prompt = formatter(messages=[{"role": "user", "content": "Hello"}]).prompt
    expected = tokenizer.encode(prompt, special=False)
    assert ChatTemplate(header, tokenizer).tokens([USER]) == expected


def test_a_model_without_a_template_is_asked_in_chatml(header: Header, tokenizer: Tokenizer) -> None:
    bare = msgspec.structs.replace(header, metadata={k: v for k, v in header.metadata.items() if k != KEY})
    template = ChatTemplate(bare, tokenizer)
    assert not template.is_own
    assert template.tokens([SYSTEM, *TALK]) == ChatTemplate(header, tokenizer).tokens([SYSTEM, *TALK])


def test_a_template_without_system_role_gets_it_in_the_first_message(header: Header, tokenizer: Tokenizer) -> None:
    template = ChatTemplate(with_template(header, NO_SYSTEM), tokenizer)
    text = read_back(tokenizer, template.tokens([SYSTEM, *TALK]))
    assert text.endswith("[user]Be brief.\n\nHello[assistant]Hi![user]Bye")


def test_merging_leaves_a_conversation_without_system_message_alone() -> None:
    assert merge_system(TALK) == TALK
    assert merge_system([SYSTEM]) == []
    assert merge_system([SYSTEM, *TALK])[1:] == TALK[1:]


@pytest.mark.parametrize("text", ["{% if %}", "{{ messages | nonsense }}", "{% for m in messages %}"])
def test_a_template_that_is_broken_is_one_line(header: Header, tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(HomeinferError, match="chat template can't be read") as caught:
        ChatTemplate(with_template(header, text), tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "{{ raise_exception('only tools\nhere') }}",
        "{{ missing.attribute }}",
        "{{ messages[7].content.strip() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for n in range(10000000) %}x{% endfor %}",
        "{{ messages.append(messages[0]) }}",
    ],
)
def test_what_a_template_refuses_or_may_not_do_is_one_line(header: Header, tokenizer: Tokenizer, text: str) -> None:
    template = ChatTemplate(with_template(header, text), tokenizer)
    with pytest.raises(HomeinferError, match="chat template refuses this") as caught:
        template.tokens([USER])
    assert "\n" not in str(caught.value)
