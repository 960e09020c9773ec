"""A model's vocabulary, loaded without its weights."""

from __future__ import annotations

import ctypes
from functools import cached_property
from typing import Any, Protocol

from homeinfer.engine import runtime
from homeinfer.errors import HomeinferError


class Vocabulary(Protocol):
    """What choosing tokens needs: their number and, for grammars only, llama.cpp's llama_vocab pointer."""

    @property
    def n_vocab(self) -> int: ...
    @property
    def vocab(self) -> Any: ...


class Tokenizer:
    """Text to token ids and back, as llama.cpp does it (llama_tokenize, llama_token_to_piece)."""

    def __init__(self, path: str) -> None:
        """Load the vocabulary of a GGUF file. Raises HomeinferError when llama.cpp can't."""
        self._lib = lib = runtime.llama()
        params = lib.llama_model_default_params()
        params.vocab_only = True
        runtime.forget_log()
        self._model: Any = lib.llama_model_load_from_file(path.encode(), params)
        if not self._model:
            raise HomeinferError(f"{path}: the vocabulary can't be loaded: {runtime.reason('no reason given')}")
        self.vocab = lib.llama_model_get_vocab(self._model)
        self.n_vocab = int(lib.llama_vocab_n_tokens(self.vocab))
        if lib.llama_vocab_type(self.vocab) == lib.LLAMA_VOCAB_TYPE_NONE:
            self.close()
            raise HomeinferError(f"{path} has no vocabulary: it can't be given text")

    def encode(self, text: str, *, special: bool = True, parse: bool = True) -> list[int]:
        """Token ids. `special` adds the tokens the model wants at the beginning (and end) of a text,
        `parse` reads tokens like <|im_start|> in the text as what they name."""
        data = text.encode("utf-8", "surrogateescape")
        room = len(data) + 16
        ids = (ctypes.c_int32 * room)()
        n = self._lib.llama_tokenize(self.vocab, data, len(data), ids, room, special, parse)
        if n < 0:
            room = -n
            ids = (ctypes.c_int32 * room)()
            n = self._lib.llama_tokenize(self.vocab, data, len(data), ids, room, special, parse)
        return list(ids[: max(n, 0)])

    def prompt(self, text: str) -> list[int]:
        """Token ids of a rendered chat template: exactly one token that begins a text, where the model wants one."""
        ids = self.encode(text, special=False)
        begin = self._lib.llama_vocab_bos(self.vocab)
        wants = self._lib.llama_vocab_get_add_bos(self.vocab) and begin >= 0
        return [begin, *ids] if wants and ids[:1] != [begin] else ids

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """What a token stands for; nothing for control tokens unless `special`. Characters may be cut."""
        room = 64
        buffer = ctypes.create_string_buffer(room)
        n = self._lib.llama_token_to_piece(self.vocab, token, buffer, room, 0, special)
        if n < 0:
            buffer = ctypes.create_string_buffer(-n)
            n = self._lib.llama_token_to_piece(self.vocab, token, buffer, -n, 0, special)
        return buffer.raw[: max(n, 0)]

    def ends(self, token: int) -> bool:
        """Whether this token ends an answer (llama_vocab_is_eog)."""
        return bool(self._lib.llama_vocab_is_eog(self.vocab, token))

    @cached_property
    def end_tokens(self) -> tuple[int, ...]:
        """All tokens that end an answer."""
        return tuple(filter(self.ends, range(self.n_vocab)))

    @property
    def bos(self) -> str:
        """The text of the token that begins a text, for chat templates."""
        return self._text_of(self._lib.llama_vocab_bos(self.vocab))

    @property
    def eos(self) -> str:
        """The text of the token that ends a text, for chat templates."""
        return self._text_of(self._lib.llama_vocab_eos(self.vocab))

    def _text_of(self, token: int) -> str:
        return "" if token < 0 else self.piece(token, special=True).decode("utf-8", "replace")

    def close(self) -> None:
        """Free the vocabulary. Safe to call twice."""
        if self._model:
            self._lib.llama_model_free(self._model)
        self._model = None
