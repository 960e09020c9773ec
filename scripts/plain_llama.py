#!/usr/bin/env python3
"""llama.cpp alone, as its own users run it, for comparisons: a process that answers on request.

    scripts/plain_llama.py MODEL.gguf --threads 2    (lines "PROMPT_TOKENS TOKENS" on stdin, a list of times on stdout)

The times are milliseconds: of the prompt to the first token, then of each further token (greedy, by numpy's argmax).
With --sequences N each further step decodes a token for each of N sequences, whose prompts are read one by one.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from typing import Any

import numpy as np
import numpy.typing as npt

N_BATCH = 512


def silent(_level: int, _text: bytes, _user: object) -> None:
    """llama.cpp's log, dropped."""


class PlainLlama:
    """Default loading, default OpenMP settings, llama_decode, the last row's logits."""

    def __init__(self, model: str, threads: int, n_ctx: int, *, repacks: bool = True, sequences: int = 1) -> None:
        from llama_cpp import llama_cpp as lib

        self._lib: Any = lib
        self._silent = lib.llama_log_callback(silent)
        lib.llama_log_set(self._silent, None)
        lib.llama_backend_init()
        loading = lib.llama_model_default_params()
        loading.use_extra_bufts = repacks
        self._model = lib.llama_model_load_from_file(model.encode(), loading)
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx * sequences, N_BATCH, N_BATCH
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = 0
        self._context = lib.llama_init_from_model(self._model, params)
        self._n_vocab = int(lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model)))
        self._batch = lib.llama_batch_init(N_BATCH, 0, sequences)
        self.sequences = sequences

    def answer(self, n_prompt: int, n_tokens: int) -> list[float]:
        """Times, milliseconds."""
        self.clear()
        prompt = np.random.default_rng(0).integers(100, 20_000, n_prompt).astype(np.int32)
        times = []
        begin = time.perf_counter()
        for start in range(0, n_prompt, N_BATCH):
            token = int(self.logits(prompt[start : start + N_BATCH]).argmax())
        for _ in range(n_tokens):
            now = time.perf_counter()
            times.append((now - begin) * 1e3)
            begin = now
            token = int(self.logits(np.array([token], np.int32)).argmax())
        return times

    def together(self, n_prompt: int, n_tokens: int) -> list[float]:
        """As `answer`, all sequences in one batch."""
        self.clear()
        prompt = np.random.default_rng(0).integers(100, 20_000, n_prompt).astype(np.int32).tolist()
        begin = time.perf_counter()
        for sequence in range(self.sequences):
            self._decode([(token, position, sequence) for position, token in enumerate(prompt)])
        times = []
        for position in range(n_prompt, n_prompt + n_tokens):
            now = time.perf_counter()
            times.append((now - begin) * 1e3)
            begin = now
            self._decode([(prompt[0], position, sequence) for sequence in range(self.sequences)])
            self._lib.llama_get_logits_ith(self._context, -1)
        return times

    def _decode(self, rows: list[tuple[int, int, int]]) -> None:
        """Each row: token, position, sequence."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, 1
        self._lib.llama_decode(self._context, batch)

    def clear(self) -> None:
        """Forget all tokens."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def logits(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Of the last of these tokens, which follow those before. float32 (n_vocab,), valid until the next call."""
        pointer = tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(pointer, len(tokens)))
        logits = self._lib.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, (self._n_vocab,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ctx", type=int, default=4096)
    parser.add_argument("--no-repack", action="store_true", help="as llama.cpp's own option, where memory is short")
    parser.add_argument("--sequences", type=int, default=1)
    a = parser.parse_args()
    llama = PlainLlama(a.model, a.threads, a.ctx, repacks=not a.no_repack, sequences=a.sequences)
    answer = llama.answer if a.sequences == 1 else llama.together
    print("ready", flush=True)
    for line in sys.stdin:
        n_prompt, n_tokens = map(int, line.split())
        print(json.dumps(answer(n_prompt, n_tokens)), flush=True)


if __name__ == "__main__":
    main()
