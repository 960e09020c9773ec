"""The answers, on the device that holds the last window: logits stay where they are made."""

from __future__ import annotations

import time
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from homeinfer.cluster.engine_messages import Routes
from homeinfer.cluster.ring_steps import first_step, logits_of
from homeinfer.cluster.wire.messages import (
    Ask,
    Cancel,
    Edits,
    Failure,
    Finished,
    Message,
    News,
    Prefilled,
    Spent,
    Step,
    Told,
)
from homeinfer.engine.generate import MOST_REPLAYED, resumed_context
from homeinfer.engine.pipeline import Floats
from homeinfer.engine.request import FinishReason, Request
from homeinfer.engine.sampling import Sampler
from homeinfer.engine.scheduler import Limits, Scheduler
from homeinfer.engine.tempo import Tempo
from homeinfer.engine.tokenizer import Tokenizer
from homeinfer.engine.window import LayerWindow
from homeinfer.errors import HomeinferError

if TYPE_CHECKING:
    from homeinfer.cluster.device import Device

_LOST = "a step did not come back from its way around the ring"


class _Writing:
    """An answer's request and its sampler."""

    def __init__(self, request: Request, sampler: Sampler) -> None:
        self.request = request
        self.sampler = sampler


class Teller:
    """Does what a Scheduler says, and tells the head of the tokens. Its steps are numbered downwards from -1, so that
    they are never taken for the head's. For one epoch."""

    def __init__(self, device: Device, windows: list[LayerWindow], routes: Routes, vocabulary: ModelVocabulary) -> None:
        last = next(windows[hop.window] for hop in routes.hops if hop.hop == routes.n_hops - 1)
        self._limits = _limits(windows, last, routes)
        self._device = device
        self._epoch = routes.epoch
        self._first = routes.first
        self._n_vocab = last.n_vocab
        self._scheduler = Scheduler(self._limits)
        self._tempo = Tempo(self._limits.groups)
        self._vocabulary = vocabulary
        self._writing: dict[int, _Writing] = {}
        self._untold: list[Prefilled | Told | Finished | Failure] = []
        self._gather_s = routes.pace.gather_ms / 1e3
        self._told_at = -1.0
        self._wanted: dict[int, int] = {}
        """Rows of logits that each step under way is to bring."""
        self._asked = 0

    def has_work(self) -> bool:
        """Whether `launch` should be called, when nothing has arrived."""
        return self._scheduler.has_work() or (bool(self._untold) and not self._may_wait())

    def launch(self) -> None:
        """Send the next step on its way, and then the tokens: what the head does with those is nobody's to wait for."""
        work = self._scheduler.next()
        if work is None:
            self._tell()
            return
        if work.batch is None:
            message: Message = Edits(self._epoch, -work.number, 0, work.edits)
            rows = b""
            self._wanted[work.number] = 0
        else:
            message, rows = first_step(self._epoch, -work.number, work.batch)
            self._wanted[work.number] = int(np.count_nonzero(work.batch.wanted))
        if self._first is None:
            self._tell()  # nobody else computes meanwhile
            self._device.pass_on(message, rows, is_own=True)
        else:
            self._device.send(self._first, message, rows)
            self._tell()

    def hear(self, message: Message, rows: Any) -> None:
        """What the head wants."""
        if isinstance(message, Ask) and message.step > self._asked:
            self._asked = message.step
            self._ask(message, rows)
        elif isinstance(message, Cancel) and message.step in self._writing:
            self._finish(message.step, "cancelled")

    def forget(self) -> None:
        """The memory was changed by somebody else."""
        self._scheduler.forget()

    def back(self, message: Message, rows: Any) -> None:
        """A step that has been through all windows."""
        number = -message.step
        if number not in self._wanted:
            return
        wanted = self._wanted[number]
        self._wanted = {later: n for later, n in self._wanted.items() if later > number}
        if isinstance(message, Failure):
            for key in self._scheduler.failed(number):
                self._fail(key, message.device, message.message, message.culprit)
        else:
            self._arrived(number, message, rows, wanted)

    def _arrived(self, number: int, message: Message, rows: Any, wanted: int) -> None:
        arrived = self._scheduler.back(number)
        for key in arrived.lost:
            self._fail(key, self._device.name, _LOST)
        for key, done in arrived.prefilled:
            self._untold.append(Prefilled(self._epoch, key, 0, done))
        if not arrived.due:
            return
        begin = time.perf_counter()
        try:
            logits = logits_of(message, rows, wanted, self._n_vocab)
        except HomeinferError as problem:  # another device changed what was asked for
            for _, key in arrived.due:
                self._give_up(key, str(problem))
            return
        spent = message.spent if isinstance(message, Step) else ()
        for row, key in arrived.due:
            begin = self._choose(key, logits[row], spent, begin)

    def _choose(self, key: int, logits: Floats, spent: tuple[Spent, ...], begin: float) -> float:
        """Let an answer go on, or end; the time now."""
        writing = self._writing[key]
        reason = self._scheduler.is_due(key)
        if reason is None:
            try:
                token = writing.sampler.choose(logits)
            except HomeinferError as problem:
                self._give_up(key, str(problem))
                return time.perf_counter()
            if token in writing.request.ends:
                reason = "stop"
            else:
                choosing = (time.perf_counter() - begin) * 1e6
                self._untold.append(Told(self._epoch, key, 0, token, spent, choosing))
                reason = self._scheduler.chosen(key, token)
                self._keep_tempo()
        if reason is not None:
            self._finish(key, reason)
        return time.perf_counter()

    def _keep_tempo(self) -> None:
        scheduler = self._scheduler
        now, is_calm = time.perf_counter(), scheduler.is_calm
        scheduler.groups = self._tempo.chosen(now, scheduler.decoding, is_calm=is_calm)

    def _ask(self, ask: Ask, rows: Any) -> None:
        try:
            prompt = _prompt(ask, rows, self._n_vocab)
            context, shifted = resumed_context(prompt, ask.request, self._limits.n_ctx, ask.can_shift)
            self._writing[ask.step] = _Writing(ask.request, self._sampler(prompt, ask.request))
        except HomeinferError as problem:
            self._fail(ask.step, self._device.name, str(problem))
            return
        self._scheduler.ask(ask.step, context, ask.request, can_shift=ask.can_shift, shifted=shifted)

    def _sampler(self, prompt: list[int], request: Request) -> Sampler:
        sampler = Sampler(request.sampling, self._vocabulary)
        try:
            sampler.remember(prompt[: len(prompt) - request.resumed])
            sampler.resume(prompt[len(prompt) - request.resumed :])
        except HomeinferError:
            sampler.close()
            raise
        return sampler

    def _finish(self, key: int, reason: FinishReason) -> None:
        finish = self._scheduler.end(key, reason)
        self._forget_answer(key)
        if finish is not None:
            self._untold.append(Finished(self._epoch, key, 0, finish))

    def _give_up(self, key: int, reason: str) -> None:
        self._scheduler.fail(key)
        self._fail(key, self._device.name, reason)

    def _fail(self, key: int, device: str, reason: str, culprit: int | None = None) -> None:
        self._forget_answer(key)
        self._untold.append(Failure(self._epoch, key, 0, device, reason, culprit))

    def _forget_answer(self, key: int) -> None:
        writing = self._writing.pop(key, None)
        if writing is not None:
            writing.sampler.close()

    def _tell(self) -> None:
        if not self._untold or self._may_wait():
            return
        alone = self._untold[0] if len(self._untold) == 1 else None
        self._device.tell(alone or News(self._epoch, 0, 0, tuple(self._untold)))
        self._untold.clear()
        self._told_at = time.perf_counter()

    def _may_wait(self) -> bool:
        """Whether the tokens can be told with the next ones, which are on their way and come soon."""
        if time.perf_counter() - self._told_at >= self._gather_s:
            return False
        return bool(self._wanted) and self._scheduler.is_calm and all(isinstance(each, Told) for each in self._untold)

    def close(self) -> None:
        """Free what the answers under way hold."""
        for key in tuple(self._writing):
            self._forget_answer(key)


class ModelVocabulary:
    """Loaded from the model when a grammar first asks for it: windows have none."""

    def __init__(self, path: str, n_vocab: int) -> None:
        self._path = path
        self.n_vocab = n_vocab

    @cached_property
    def vocab(self) -> Any:
        self._tokenizer = Tokenizer(self._path)
        return self._tokenizer.vocab


def _limits(windows: list[LayerWindow], last: LayerWindow, routes: Routes) -> Limits:
    """What the ring can take, and how it is fed where the Routes leave that open: so that all devices have work, but
    where weights are streamed in few steps, one after the other, since each reads them all."""
    pace, spec = routes.pace, last.spec
    elsewhere = routes.n_hops - len(routes.hops)
    is_streamed = any(not window.spec.resident and not window.spec.gpu_layers for window in windows)
    ahead = pace.ahead or (routes.n_hops + 1 if elsewhere else 1)
    groups = pace.groups or (1 if is_streamed else elsewhere + 1)
    chunk = pace.chunk or (spec.n_batch if is_streamed else 0)
    replay = pace.replay or (1 if is_streamed else MOST_REPLAYED)
    return Limits(spec.n_seq, spec.n_ctx, spec.n_batch, chunk, ahead, groups, replay)


def _prompt(ask: Ask, rows: Any, n_vocab: int) -> list[int]:
    """The prompt's tokens. Raises HomeinferError for what is not what the Ask says."""
    if memoryview(rows).nbytes != 4 * ask.n or ask.request.resumed > ask.n:
        raise HomeinferError(f"a prompt of {ask.n} tokens came as {memoryview(rows).nbytes} bytes")
    tokens = np.frombuffer(rows, np.int32)
    if ask.n and not (int(tokens.min()) >= 0 and int(tokens.max()) < n_vocab):
        raise HomeinferError("a token is outside the vocabulary")
    found: list[int] = tokens.tolist()
    return found
