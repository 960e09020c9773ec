"""Text that a model writes itself, half of it as conversations: what it is calibrated on beside given texts.

Weights matter by the inputs they get at work, and at work a model reads its own words between its template's tokens.
Rounding with second moments fits the text it is given, and without this chat suffers most (scripts/bench_quality.py
--other-texts measures it). Sampling is plain: temperature 1, nothing cut off.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from homeinfer.engine.tokenizer import Tokenizer
from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header, printable, read_header
from homeinfer.quant.budget import kv_cache_bytes
from homeinfer.quant.chat_turns import Turns, find_turns
from homeinfer.quant.mapped_model import MappedModel

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]

N_SEQUENCES = 48
LENGTH = 320
SEED = 1

_LOGITS_BYTES = 64_000_000
_SHARE_OF_MEMORY = 8
_MOST_SEQUENCES = 256
"""LLAMA_MAX_SEQ"""
_CELLS = 256
"""llama.cpp rounds a sequence's part of the KV cache up to a multiple of this."""
_UNKNOWN, _UNUSED, _NORMAL, _CONTROL = 1, 2, 4, 8
"""enum llama_token_attr"""


def generate(
    model_path: str | os.PathLike[str],
    *,
    n_sequences: int = N_SEQUENCES,
    length: int = LENGTH,
    seed: int = SEED,
    threads: int,
    on_progress: Callable[[float], None] | None = None,
) -> list[Ints]:
    """Sequences of tokens (int32 [length] each) that the model wrote; the first half (rounded up) are conversations,
    where it has a chat template that can be rendered.

    The same for a seed on a machine with the same memory: there are fewer sequences (half as many, and again) where
    memory is short, see `bounded`, and they are no longer than the context that the model was trained with.
    Raises HomeinferError for a model without a vocabulary, and for one that can't be run or gives no numbers.
    """
    header = read_header(model_path)
    tokenizer = Tokenizer(os.fspath(model_path))
    try:
        available = psutil.virtual_memory().available
        n_sequences, length = bounded(header, tokenizer.n_vocab, n_sequences, length, available)
        turns = find_turns(header, tokenizer)
        if turns is not None and len(turns.start) + len(turns.answer) > length * 3 // 4:
            turns = None  # there would be hardly a word between the template's
        writers = _writers(_Vocabulary(tokenizer, turns), turns, n_sequences, length, np.random.default_rng(seed))
        model = _Batched(header, threads, n_sequences, length, tokenizer.n_vocab)
        with model:
            return _write(model, writers, length, np.random.default_rng([seed, 1]), on_progress)
    finally:
        tokenizer.close()


def bounded(header: Header, n_vocab: int, n_sequences: int, length: int, available: int) -> tuple[int, int]:
    """How many sequences go at once, and how long they are: n_sequences is halved until the logits (F32) take at most
    64 MB and the KV cache or states an eighth of the available memory (bytes); at least one is left."""
    trained = header.arch_get("context_length", 0)
    if isinstance(trained, int) and trained > 0:
        length = min(length, trained)
    cells = -(-length // _CELLS) * _CELLS
    each = kv_cache_bytes(header, cells)
    n_sequences = min(n_sequences, _MOST_SEQUENCES)
    while n_sequences > 1 and (
        4 * n_vocab * n_sequences > _LOGITS_BYTES or each * n_sequences > available // _SHARE_OF_MEMORY
    ):
        n_sequences //= 2
    return n_sequences, length


class _Batched(MappedModel):
    """A model that continues many sequences at once, a token of each at a time."""

    def __init__(self, header: Header, threads: int, n_sequences: int, length: int, n_vocab: int) -> None:
        def set_params(params: Any) -> None:
            params.n_ctx = n_sequences * length
            params.n_batch = params.n_ubatch = params.n_seq_max = n_sequences
            params.kv_unified = False

        super().__init__(header, threads, set_params)
        self.name = printable(header.files[0].path, 1000)
        self._shape = n_sequences, n_vocab
        self._ones = np.ones(n_sequences, np.int8)
        self._counts = np.ones(n_sequences, np.int32)
        self._ids = np.arange(n_sequences, dtype=np.int32)
        pointer = ctypes.POINTER(ctypes.c_int32)
        start = self._ids.ctypes.data
        self._id_pointers = (pointer * n_sequences)(
            *(ctypes.cast(start + self._ids.itemsize * i, pointer) for i in range(n_sequences))
        )

    def step(self, tokens: Ints, position: int) -> Floats:
        """Logits, float32 [n_sequences, n_vocab], after each sequence's token (int32 [n_sequences]) at this position.

        They are llama.cpp's own memory, good until the next step.
        """
        pointer = ctypes.POINTER(ctypes.c_int32)
        positions = np.full(len(tokens), position, np.int32)
        batch = self._lib.llama_batch(
            n_tokens=len(tokens),
            token=tokens.ctypes.data_as(pointer),
            pos=positions.ctypes.data_as(pointer),
            n_seq_id=self._counts.ctypes.data_as(pointer),
            seq_id=self._id_pointers,
            logits=self._ones.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        status = self._lib.llama_decode(self._context, batch)
        logits = self._lib.llama_get_logits(self._context) if status == 0 else None
        if not logits:
            raise HomeinferError(f"{self.name}: llama.cpp can't continue its own text (status {status}): give a --text")
        return np.ctypeslib.as_array(logits, self._shape)


class _Vocabulary:
    """Which tokens may come where, as ids. Tokens that end an answer may come everywhere."""

    def __init__(self, tokenizer: Tokenizer, turns: Turns | None) -> None:
        lib, vocab = tokenizer._lib, tokenizer.vocab
        attributes = np.array([lib.llama_vocab_get_attr(vocab, i) for i in range(tokenizer.n_vocab)], np.int32)
        special = np.flatnonzero(attributes & (_UNKNOWN | _UNUSED | _CONTROL)).tolist()
        wants_begin = lib.llama_vocab_get_add_bos(vocab) and lib.llama_vocab_bos(vocab) >= 0
        in_turns = {token for part in turns or () for token in part}
        self.begin: tuple[int, ...] = (lib.llama_vocab_bos(vocab),) if wants_begin else ()
        self.normal = np.flatnonzero(attributes & _NORMAL)
        if not len(self.normal):
            self.normal = np.arange(tokenizer.n_vocab)
        self.ends = tokenizer.ends
        self.special = frozenset(special)
        self.not_in_text = np.array([i for i in special if not self.ends(i)], np.intp)
        self.not_in_question = np.array([i for i in self.not_in_text if not turns or i != turns.answer[0]], np.intp)
        self.not_in_answer = np.array([i for i in self.not_in_text if i not in in_turns], np.intp)


class _Writer:
    """One sequence of plain text: what has to come next, and what may."""

    def __init__(self, vocabulary: _Vocabulary, rng: np.random.Generator) -> None:
        self._vocabulary = vocabulary
        self._rng = rng
        self._due = deque(self._start())

    @property
    def is_free(self) -> bool:
        """Whether the next token is the model's to choose."""
        return not self._due

    @property
    def banned(self) -> npt.NDArray[np.intp]:
        """Ids that may not be drawn now."""
        return self._vocabulary.not_in_text

    def next(self, drawn: int) -> int:
        """The token that comes now: what is due, or the one that the model drew."""
        if not self._due:
            self._due.extend(self._instead(drawn))
        return self._due.popleft()

    def _start(self) -> Sequence[int]:
        """A random word first: from the begin of a text alone, sequences would be much alike."""
        return [*self._vocabulary.begin, int(self._rng.choice(self._vocabulary.normal))]

    def _instead(self, drawn: int) -> Sequence[int]:
        return [drawn, *self._start()] if self._vocabulary.ends(drawn) else [drawn]


class _Conversation(_Writer):
    """The model speaks for the user and for itself. A question is cut off after `longest` tokens."""

    def __init__(self, vocabulary: _Vocabulary, rng: np.random.Generator, turns: Turns, longest: int) -> None:
        self._turns = turns
        self._longest = longest
        self._is_question = True
        self._said = 0
        super().__init__(vocabulary, rng)

    @property
    def banned(self) -> npt.NDArray[np.intp]:
        return self._vocabulary.not_in_question if self._is_question else self._vocabulary.not_in_answer

    def _start(self) -> Sequence[int]:
        return self._turns.start

    def _instead(self, drawn: int) -> Sequence[int]:
        self._said += 1
        if not self._is_over(drawn):
            return [drawn]
        self._said = 0
        self._is_question = not self._is_question
        if not self._is_question:
            return self._turns.answer
        return self._turns.again or [drawn, *self._start()]

    def _is_over(self, drawn: int) -> bool:
        if self._vocabulary.ends(drawn):
            return True
        answer = self._turns.answer[0]  # some models end a question, but no answer, with a token of their template
        is_template = drawn == answer and answer in self._vocabulary.special
        return self._is_question and (is_template or self._said > self._longest)


def _writers(
    vocabulary: _Vocabulary, turns: Turns | None, n_sequences: int, length: int, rng: np.random.Generator
) -> list[_Writer]:
    chats = (n_sequences + 1) // 2 if turns is not None else 0
    talks: list[_Writer] = [_Conversation(vocabulary, rng, turns, length // 2) for _ in range(chats)] if turns else []
    return talks + [_Writer(vocabulary, rng) for _ in range(n_sequences - chats)]


def _write(
    model: _Batched,
    writers: Sequence[_Writer],
    length: int,
    rng: np.random.Generator,
    on_progress: Callable[[float], None] | None,
) -> list[Ints]:
    texts = np.zeros((len(writers), length), np.int32)
    drawn = [0] * len(writers)
    for position in range(length):
        texts[:, position] = [writer.next(token) for writer, token in zip(writers, drawn, strict=True)]
        if position + 1 < length:
            logits = model.step(np.ascontiguousarray(texts[:, position]), position)
            at = rng.random(len(writers))
            for i, writer in enumerate(writers):
                if writer.is_free:
                    drawn[i] = _draw(logits[i], writer.banned, float(at[i]), model.name)
        if on_progress is not None:
            on_progress((position + 1) / length)
    return list(texts)


def _draw(logits: Floats, banned: npt.NDArray[np.intp], at: float, name: str) -> int:
    """The token whose share of softmax(logits), one after the other, covers `at` in [0, 1)."""
    weights = logits.copy()
    weights[banned] = -np.inf
    top = float(weights.max())
    if not math.isfinite(top):
        raise HomeinferError(f"{name}: the model's logits are no numbers: its file is damaged, get it again")
    weights -= top
    np.exp(weights, out=weights)
    sums = np.cumsum(weights)
    token = int(np.searchsorted(sums, at * sums[-1], side="right"))
    return token if token < len(weights) else int(weights.argmax())
