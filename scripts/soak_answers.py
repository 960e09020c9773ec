"""Chats that go on while a home is disturbed, and whether their answers are those of an undisturbed run."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from homeinfer.cluster.client import ClusterTeller, find_cluster
from homeinfer.engine import runtime
from homeinfer.engine.request import Request, Sampling
from homeinfer.errors import HomeinferError

TIE = 0.05
"""Two best logits closer than this may fall either way (design/ENGINE.md, what "equal" means)."""
HANG_SECONDS = 30.0


class Reference(msgspec.Struct, frozen=True):
    """What llama.cpp alone answers to a prompt, greedily. gaps: between the two best logits at each token."""

    prompt: list[int]
    tokens: list[int]
    gaps: list[float]


class Answer(msgspec.Struct, frozen=True):
    """One answer of a chat. silence: the longest time without a token, seconds; wrong: why it isn't the reference's,
    None when it is; tie: a difference that the reference's logits allow."""

    prompt: int
    n_tokens: int
    silence: float
    wrong: str | None
    tie: bool
    notices: tuple[str, ...]


def references(model: Path, prompts: Sequence[str], n_tokens: int) -> tuple[Reference, ...]:
    """llama.cpp's own greedy answers, whole model, one process."""
    lib: Any = runtime.llama()
    loaded = lib.llama_model_load_from_file(str(model).encode(), lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_threads, params.flash_attn_type = 1024, 2, 0
    context = lib.llama_init_from_model(loaded, params)
    vocab = lib.llama_model_get_vocab(loaded)
    n_vocab = int(lib.llama_vocab_n_tokens(vocab))
    made = [_reference(lib, context, _tokens(lib, vocab, prompt), n_vocab, n_tokens) for prompt in prompts]
    lib.llama_free(context)
    lib.llama_model_free(loaded)
    return tuple(made)


def _tokens(lib: Any, vocab: Any, text: str) -> list[int]:
    data = text.encode()
    buffer = (ctypes.c_int32 * (len(data) + 8))()
    count = lib.llama_tokenize(vocab, data, len(data), buffer, len(buffer), True, True)
    return list(buffer[:count])


def _reference(lib: Any, context: Any, prompt: list[int], n_vocab: int, n_tokens: int) -> Reference:
    lib.llama_memory_clear(lib.llama_get_memory(context), True)
    tokens: list[int] = []
    gaps: list[float] = []
    batch = np.array(prompt, np.int32)
    for _ in range(n_tokens):
        pointer = batch.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        lib.llama_decode(context, lib.llama_batch_get_one(pointer, len(batch)))
        logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), (n_vocab,))
        second, first = np.sort(np.partition(logits, -2)[-2:])
        tokens.append(int(logits.argmax()))
        gaps.append(float(first - second))
        batch = np.array(tokens[-1:], np.int32)
    return Reference(prompt, tokens, gaps)


def judge(reference: Reference, tokens: Sequence[int]) -> tuple[str | None, bool]:
    """(why the tokens are wrong or None, whether they left the reference at a tie)."""
    for at, (wanted, got) in enumerate(zip(reference.tokens, tokens, strict=False)):
        if wanted != got:
            if reference.gaps[at] < TIE:
                return None, True
            return f"token {at} is {got} instead of {wanted}, a gap of {reference.gaps[at]:.3f}", False
    if len(tokens) != len(reference.tokens):
        return f"{len(tokens)} tokens instead of {len(reference.tokens)}", False
    return None, False


class Chat(threading.Thread):
    """Asks the prompts in turn until `stop`; `answers` has what came of them."""

    def __init__(self, folder: Path, known: Sequence[Reference], first: int, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self._folder, self._known, self._next, self._stop_asked = folder, known, first, stop
        self.answers: list[Answer] = []
        self.waiting_since: float | None = None
        """When the answer under way last got a token, on time.monotonic's clock."""

    def run(self) -> None:
        while not self._stop_asked.is_set():
            number = self._next % len(self._known)
            self._next += 1
            self.answers.append(self._ask(number))
            self.waiting_since = None

    def _ask(self, number: int) -> Answer:
        reference = self._known[number]
        tokens: list[int] = []
        notices: list[str] = []
        silence, problem = 0.0, None
        self.waiting_since = last = time.monotonic()

        def on_token(token: int) -> None:
            nonlocal silence, last
            now = time.monotonic()
            silence, last = max(silence, now - last), now
            self.waiting_since = now
            tokens.append(token)

        try:
            with contextlib.closing(self._teller(notices)) as teller:
                request = Request(Sampling(temperature=0), limit=len(reference.tokens), fresh=True)
                teller.tell(reference.prompt, request, on_token, lambda: False)
        except HomeinferError as error:
            problem = str(error)
        except Exception as error:  # a chat that ended by a bug would be missed by nobody
            problem = f"{type(error).__name__}: {error}"
        silence = max(silence, time.monotonic() - last)
        wrong, tie = judge(reference, tokens)
        return Answer(number, len(tokens), silence, problem or wrong, tie, tuple(notices))

    def _teller(self, notices: list[str]) -> ClusterTeller:
        """Waits for a head that has just been killed. Raises HomeinferError when none comes."""
        deadline = time.monotonic() + 60
        while True:
            try:
                client = find_cluster(self._folder)
                if client is not None:
                    with contextlib.closing(client):
                        return ClusterTeller(self._folder, client.status(), notices.append)
            except HomeinferError:
                pass
            if time.monotonic() > deadline:
                raise HomeinferError("no cluster for 60 s")
            time.sleep(0.2)
