"""Choosing the next token with llama.cpp's samplers."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from homeinfer.engine import runtime
from homeinfer.engine.pipeline import Floats
from homeinfer.engine.request import Sampling
from homeinfer.engine.tokenizer import Vocabulary
from homeinfer.errors import HomeinferError

_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


_RANDOM_SEED = 0xFFFFFFFF
"""LLAMA_DEFAULT_SEED: llama.cpp takes another seed each time instead."""


def _has_penalties(s: Sampling) -> bool:
    return s.repeat_penalty != 1.0 or s.frequency_penalty != 0 or s.presence_penalty != 0


class Sampler:
    """A chain of llama.cpp samplers over one vocabulary."""

    def __init__(self, sampling: Sampling, vocabulary: Vocabulary) -> None:
        """Raises HomeinferError for a grammar that llama.cpp can't read."""
        self._lib = runtime.llama()
        self._repeat_last_n = sampling.repeat_last_n
        self._is_greedy = sampling.temperature == 0 and not _has_penalties(sampling)
        self._grammar: Any = self._make_grammar(sampling.grammar, vocabulary)
        self._chain: Any = self._make_chain(sampling, vocabulary.n_vocab)
        self._buffer = np.zeros(vocabulary.n_vocab, _CANDIDATE)
        self._ids = np.arange(vocabulary.n_vocab, dtype=np.int32)

    def _make_grammar(self, text: str | None, vocabulary: Vocabulary) -> Any:
        if text is None:
            return None
        with runtime.quiet_stderr():  # llama.cpp's parser writes there, not to its log
            grammar = self._lib.llama_sampler_init_grammar(vocabulary.vocab, text.encode(), b"root")
        if not grammar or not text.strip() or "\0" in text:
            raise HomeinferError("the grammar can't be read: it must be GBNF with a rule named root")
        return grammar

    def _make_chain(self, s: Sampling, n_vocab: int) -> Any:
        lib = self._lib
        chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        if _has_penalties(s):
            penalties = (n_vocab, s.repeat_last_n, s.repeat_penalty, s.frequency_penalty, s.presence_penalty)
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_penalties(*penalties))
        if s.temperature == 0:
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_greedy())
            return chain
        if s.top_k:
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_top_k(s.top_k))
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_top_p(s.top_p, 1))
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_min_p(s.min_p, 1))
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_temp(s.temperature))
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_dist(s.seed % _RANDOM_SEED))
        return chain

    def choose(self, logits: Floats) -> int:
        """The next token for one row of logits, float32 [n_vocab]. Raises HomeinferError for logits
        that are not numbers, or when the grammar allows no token."""
        if len(logits) != len(self._ids):
            raise HomeinferError(f"{len(logits)} logits for a vocabulary of {len(self._ids)} tokens")
        likeliest = int(logits.argmax())  # of any that is not a number, the first
        if not np.isfinite(logits[likeliest]):
            raise HomeinferError("the model's output is not a number: the file may be damaged")
        token = likeliest if self._is_greedy else self._chosen(logits)
        if self._grammar is not None and not self._grammar_allows(token):
            token = self._apply(self._chain, logits, with_grammar=True)
            if not self._grammar_allows(token):
                raise HomeinferError("the grammar allows no further token")
        self._accept(token)
        return token

    def _chosen(self, logits: Floats) -> int:
        """Without the grammar; where there is one, on a copy, since what it refuses must not cost a draw."""
        if self._grammar is None:
            return self._apply(self._chain, logits, with_grammar=False)
        copy = self._lib.llama_sampler_clone(self._chain)
        token = self._apply(copy, logits, with_grammar=False)
        if self._grammar_allows(token):
            copy, self._chain = self._chain, copy
        self._lib.llama_sampler_free(copy)
        return token

    def _accept(self, token: int) -> None:
        self._lib.llama_sampler_accept(self._chain, token)
        if self._grammar is not None:
            self._lib.llama_sampler_accept(self._grammar, token)

    def resume(self, told: Sequence[int]) -> None:
        """Go on behind these tokens, which a sampler like this one has chosen. Raises HomeinferError for tokens that
        the grammar does not allow."""
        draws = self._lib.llama_sampler_chain_get(self._chain, self._lib.llama_sampler_chain_n(self._chain) - 1)
        two = np.zeros(2, _CANDIDATE)
        for token in told:
            if self._grammar is not None and not self._grammar_allows(token):
                raise HomeinferError("the grammar does not allow the answer that is to be resumed")
            self._accept(token)
            self._lib.llama_sampler_apply(draws, ctypes.byref(self._candidates(two)))

    def remember(self, prompt: Sequence[int]) -> None:
        """Let the repetition penalties know of the tokens before the answer."""
        for token in prompt[-self._repeat_last_n :] if self._repeat_last_n else ():
            self._lib.llama_sampler_accept(self._chain, token)

    def _apply(self, chain: Any, logits: Floats, *, with_grammar: bool) -> int:
        self._buffer["id"] = self._ids
        self._buffer["logit"] = logits
        candidates = self._candidates(self._buffer)
        if with_grammar:
            self._lib.llama_sampler_apply(self._grammar, ctypes.byref(candidates))
        self._lib.llama_sampler_apply(chain, ctypes.byref(candidates))
        return int(candidates.data[candidates.selected].id)

    def _grammar_allows(self, token: int) -> bool:
        one = np.array([(token, 1.0, 0.0)], _CANDIDATE)
        self._lib.llama_sampler_apply(self._grammar, ctypes.byref(self._candidates(one)))
        return bool(np.isfinite(one["logit"][0]))

    def _candidates(self, rows: Any) -> Any:
        array = self._lib.llama_token_data_array()
        array.data = ctypes.cast(ctypes.c_void_p(rows.ctypes.data), ctypes.POINTER(self._lib.llama_token_data))
        array.size, array.selected, array.sorted = len(rows), -1, False
        return array

    def close(self) -> None:
        """Free the samplers. Safe to call twice."""
        for sampler in (self._chain, self._grammar):
            if sampler is not None:
                self._lib.llama_sampler_free(sampler)
        self._chain = self._grammar = None
