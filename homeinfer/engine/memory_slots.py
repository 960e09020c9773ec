"""The sequences of a pipeline's memory: what is in each, and which of them a prompt should have."""

from __future__ import annotations

from collections.abc import Sequence

from homeinfer.engine.edits import KvEdit, Remove, Shift
from homeinfer.engine.generate import Reuse, common_start, plan_prefix, plan_reuse, plan_shift
from homeinfer.engine.request import Request


class Slot:
    """One sequence. cached: its tokens, as of what was sent; the first `pure` of them saw only each other, in these
    places: the others belong to a conversation whose middle was left out. is_stale: what is in it is not known.
    epoch: how often it was emptied. key: of the answer that has it."""

    def __init__(self, sequence: int) -> None:
        self.sequence = sequence
        self.cached: list[int] = []
        self.pure = 0
        self.session = ""
        self.used = 0
        self.is_stale = False
        self.epoch = 0
        self.key: int | None = None

    def empty(self) -> tuple[KvEdit, ...]:
        """Forget everything."""
        self.cached, self.pure, self.is_stale = [], 0, False
        self.epoch += 1
        return (Remove(self.sequence),)

    def prepare(self, prompt: Sequence[int], request: Request, can_edit: bool) -> tuple[tuple[KvEdit, ...], int]:
        """Keep what serves a prompt: the edits for that, and how many tokens of the prompt are kept."""
        is_void = self.is_stale or (request.fresh and bool(self.cached))
        edits = self.empty() if is_void else ()
        reuse = self._reuse(prompt, request.session, can_edit)
        moved = [edit.start + edit.delta for edit in reuse.edits if isinstance(edit, Shift)]
        self.pure = min(self.pure, reuse.kept, *moved)
        self.cached = list(prompt[: reuse.kept])
        self.session = request.session
        return (*edits, *reuse.edits), reuse.kept

    def _reuse(self, prompt: Sequence[int], session: str, can_edit: bool) -> Reuse:
        if session == self.session:
            return plan_reuse(self.cached, prompt, can_edit, self.sequence)
        return plan_prefix(self.cached, prompt, can_edit, self.pure, self.sequence)

    def append(self, tokens: Sequence[int]) -> None:
        """These were sent."""
        if self.pure == len(self.cached):
            self.pure += len(tokens)
        self.cached.extend(tokens)

    def shift(self, keep: int) -> tuple[tuple[KvEdit, ...], int]:
        """Make room in a full context: the edits, and how many tokens leave."""
        edits, leave = plan_shift(len(self.cached), keep, self.sequence)
        del self.cached[keep : keep + leave]
        self.pure = min(self.pure, keep)
        return edits, leave


def choose_slot(slots: Sequence[Slot], prompt: Sequence[int], request: Request) -> Slot | None:
    """The idle slot for a prompt: its own conversation's, else the one of which it can use the most and loses little,
    else the one that was not used for the longest time. None when all are busy."""

    def worth(slot: Slot) -> tuple[bool, int, int]:
        if slot.is_stale or request.fresh:
            return False, 0, -slot.used
        is_own = bool(request.session) and slot.session == request.session
        shared = common_start(slot.cached[: slot.pure], prompt)
        return is_own, shared if 2 * shared >= len(slot.cached) else 0, -slot.used

    return max((slot for slot in slots if slot.key is None), key=worth, default=None)
