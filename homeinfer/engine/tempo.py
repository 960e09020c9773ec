"""How many decode steps should be under way at once: found out, not assumed.

More of them keep more devices at work. But where devices share a processor, or read weights for each step, one step of
all answers is faster, by a factor of four in one case.
"""

from __future__ import annotations

_SETTLE = 2
_MEASURE = 5
"""Tokens of each answer that pass after a change before it is timed, and that are timed."""
_PERIODS = 50
"""After so many of these times the slower way is tried again."""


class Tempo:
    """Times one step at a time and `most` at a time, for each number of answers, and takes the faster."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._answers = self._count = self._periods = 0
        self._since = 0.0
        self._rates: dict[tuple[int, int], float] = {}
        self.groups = 1

    def chosen(self, now: float, answers: int, *, is_calm: bool = True) -> int:
        """Called for each token that was chosen, at `now` seconds, for one of so many answers; is_calm: nothing but
        decode steps was under way. Returns how many of these there should be."""
        if self._most == 1 or answers < 2:
            return self.groups
        if answers != self._answers:
            self._answers = answers
            self._begin(self._next(answers))
        if not is_calm:
            self._count = 0
        self._count += 1
        if self._count == _SETTLE * answers:
            self._since = now
        elif self._count >= (_SETTLE + _MEASURE) * answers:
            self._rates[answers, self.groups] = _MEASURE * answers / max(now - self._since, 1e-9)
            self._begin(self._next(answers))
        return self.groups

    def _begin(self, groups: int) -> None:
        self.groups, self._count = groups, 0

    def _next(self, answers: int) -> int:
        """What to do in the next period: what was not tried yet, else what is faster."""
        self._periods += 1
        known = self._known(answers)
        untried = [groups for groups in (1, self._most) if (known, groups) not in self._rates]
        if untried:
            return untried[0]
        one, most = self._rates[known, 1], self._rates[known, self._most]
        slower, faster = (1, self._most) if most > one else (self._most, 1)
        if self._periods % _PERIODS == 0:
            return slower
        return faster

    def _known(self, answers: int) -> int:
        """The nearest number of answers for which both ways were timed, unless it is far from this one."""
        both = [n for n, groups in self._rates if groups == 1 and (n, self._most) in self._rates]
        near = [n for n in both if n <= 2 * answers and answers <= 2 * n]
        return min(near, key=lambda n: abs(n - answers), default=answers)
