"""What `homeinfer bench` asks for, and how it shows what came."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from homeinfer.cli.bars import fraction_bar
from homeinfer.cli.cluster_view import slow_line
from homeinfer.cli.plan_tables import milliseconds
from homeinfer.cli.ui import console
from homeinfer.cluster.client import need_cluster
from homeinfer.cluster.client_bench import Prober, Seen, Shares, shares, together_per_s
from homeinfer.cluster.planning.report import PlanReport
from homeinfer.cluster.wire.client import ClusterStatus, DeviceStatus
from homeinfer.engine.tokenizer import Tokenizer
from homeinfer.errors import HomeinferError

_PROMPTS = (16, 512, 4096)
_AT_ONCE = (1, 2, 4, 8)
_TIMES = 3
"""A prompt that is answered within a second is asked so often, and the median taken."""
FORGET_SECONDS = 5.5
"""Longer than what a coordinator's shares look back."""
LOOK_SECONDS = 4.0
_MOST_TOKENS = 4096
_MOST_TIMES = 32
"""Of several answers the first has this many times the tokens that are timed, while the prompts of others are read."""
_TEXT = (
    "The lighthouse keeper climbed the stairs every evening to light the lamp. From up there he could see the harbour, "
    "the islands and, on clear nights, the lights of the ships that passed far out. He wrote their names into a book, "
    "with the hour, the wind and the colour of the sky. "
)


class FirstToken(msgspec.Struct, frozen=True):
    """Time to the first token of a prompt of so many tokens, from an empty memory."""

    prompt_tokens: int
    ttft_ms: float
    prompt_tokens_per_s: float


class EachToken(msgspec.Struct, frozen=True):
    """Answers at once: the time per token of each (median), and tokens per second of all together."""

    sequences: int
    tpot_ms: float
    tokens_per_s: float


class Compared(msgspec.Struct, frozen=True):
    """What the plan predicted, and what was measured under the same conditions: so many answers at once, behind a
    prompt of so many tokens."""

    prompt_tokens: int
    sequences: int
    predicted_tpot_ms: float
    measured_tpot_ms: float
    predicted_ttft_ms: float
    measured_ttft_ms: float


class Slowdown(msgspec.Struct, frozen=True):
    """How many times as long as the plan predicts a device computes for a token (DeviceStatus.slowdown)."""

    name: str
    times: float


class BenchResult(msgspec.Struct, frozen=True):
    """What `homeinfer bench --json` prints. left_out: what could not be measured, and why. notices: what the cluster
    said meanwhile. slowdowns: of the devices of which it can be said."""

    model: str
    n_ctx: int
    sequences: int
    first_tokens: tuple[FirstToken, ...]
    each_token: tuple[EachToken, ...]
    devices: tuple[Shares, ...]
    compared: Compared | None
    left_out: tuple[str, ...]
    notices: tuple[str, ...]
    slowdowns: tuple[Slowdown, ...] = ()


class Steps(msgspec.Struct, frozen=True):
    """What is to be measured: prompts for the first token, answers at once for each token."""

    prompts: tuple[int, ...]
    at_once: tuple[int, ...]
    compared: tuple[int, int] | None
    left_out: tuple[str, ...]


def plan_steps(status: ClusterStatus, plan: PlanReport | None, n_tokens: int) -> Steps:
    """As far as context and sequences allow. Pure."""
    room = status.n_ctx - 1
    prompts = tuple(n for n in _PROMPTS if n <= room)
    at_once = tuple(n for n in _AT_ONCE if n <= status.sequences)
    left_out = [f"a prompt of {n:,} tokens: the context holds {status.n_ctx:,} (--ctx)" for n in _PROMPTS if n > room]
    left_out += [
        f"{n} answers at once: the cluster was brought up for {status.sequences} (--sequences)"
        for n in _AT_ONCE
        if n > status.sequences
    ]
    compared = None
    if plan is not None:
        prompt = min(plan.workload.prompt_tokens, room - n_tokens)
        compared = (prompt, plan.workload.sequences) if prompt > 0 else None
    return Steps(prompts, at_once, compared, tuple(left_out))


def measure(n_tokens: int) -> BenchResult:
    """Raises HomeinferError when no cluster runs here, or it is not ready."""
    with contextlib.closing(need_cluster()) as client:
        status = client.status()
        if status.state != "ready":
            raise HomeinferError(f"the cluster is not ready yet ({status.state}): homeinfer cluster status shows it")
        plan = client.plan()
        if status.answers:
            raise HomeinferError("the cluster is writing answers: measure when it is idle")
        with (
            contextlib.closing(Tokenizer(status.model_path)) as tokenizer,
            contextlib.closing(Prober(Path(client.folder))) as prober,
            fraction_bar("measuring") as on_progress,
        ):
            steps = plan_steps(status, plan, n_tokens)
            result = _Bench(prober, _texts(tokenizer), n_tokens, steps, on_progress).run(status, plan)
            return msgspec.structs.replace(result, slowdowns=slowdowns(client.status().devices))


def slowdowns(devices: Sequence[DeviceStatus]) -> tuple[Slowdown, ...]:
    return tuple(Slowdown(device.name, device.slowdown) for device in devices if device.slowdown is not None)


def _texts(tokenizer: Tokenizer) -> Callable[[int, int], list[int]]:
    """Prompts of any number of tokens; those of different numbers differ from their first words on."""

    def text(n: int, number: int) -> list[int]:
        said = tokenizer.encode(f"Story {number}. {_TEXT}", parse=False)
        return (said * (n // len(said) + 1))[:n]

    return text


class _Bench:
    def __init__(
        self,
        prober: Prober,
        text: Callable[[int, int], list[int]],
        n_tokens: int,
        steps: Steps,
        on_progress: Callable[[float], None] | None,
    ) -> None:
        self._prober, self._text, self._n_tokens, self._steps = prober, text, n_tokens, steps
        self._on_progress = on_progress
        self._number = self._done = self._n_ctx = 0
        self._all = len(steps.prompts) * _TIMES + n_tokens * (sum(steps.at_once) + (steps.compared or (0, 0))[1])

    def run(self, status: ClusterStatus, plan: PlanReport | None) -> BenchResult:
        self._n_ctx = status.n_ctx
        self._answers(16, 1, 2)  # what is slow only once
        firsts = tuple(self._first(n) for n in self._steps.prompts)
        seen = {
            n: self._answers(min(16, status.n_ctx - 2), n, self._tokens_left(status, 16)) for n in self._steps.at_once
        }
        compared, notices = self._compare(plan, status)
        looks = self._looks(_each(1, seen[1]).tpot_ms)
        return BenchResult(
            model=status.model,
            n_ctx=status.n_ctx,
            sequences=status.sequences,
            first_tokens=firsts,
            each_token=tuple(_each(n, found) for n, found in seen.items()),
            devices=shares(looks),
            compared=compared,
            left_out=self._steps.left_out,
            notices=(*(notice for found in seen.values() for notice in found.notices), *notices),
        )

    def _looks(self, tpot_ms: float) -> tuple[tuple[DeviceStatus, ...], ...]:
        """How the devices were while one answer was written, after a pause in which older ones are forgotten."""
        time.sleep(FORGET_SECONDS)
        n_tokens = min(max(round(LOOK_SECONDS * 1e3 / max(tpot_ms, 0.1)), 2), _MOST_TOKENS)
        seen = self._answers(16, 1, n_tokens)
        return seen.looks[1:] or seen.looks  # the first look saw the prompt, too

    def _tokens_left(self, status: ClusterStatus, prompt: int) -> int:
        return max(2, min(self._n_tokens, status.n_ctx - prompt - 1))

    def _answers(self, prompt: int, at_once: int, n_tokens: int) -> Seen:
        prompts = [self._text(prompt, self._number + i) for i in range(at_once)]
        self._number += at_once
        room = self._n_ctx - prompt - 1
        most = max(n_tokens, min(room, _MOST_TIMES * n_tokens)) if at_once > 1 else None
        return self._prober.run(prompts, n_tokens, self._count, most)

    def _first(self, prompt: int) -> FirstToken:
        found = [self._answers(prompt, 1, 1).answers[0].ttft_ms]
        while len(found) < _TIMES and found[-1] < 1000:
            found.append(self._answers(prompt, 1, 1).answers[0].ttft_ms)
        ttft = statistics.median(found)
        return FirstToken(prompt, ttft, 1e3 * prompt / ttft)

    def _compare(self, plan: PlanReport | None, status: ClusterStatus) -> tuple[Compared | None, tuple[str, ...]]:
        if plan is None or self._steps.compared is None:
            return None, ()
        prompt, at_once = self._steps.compared
        ttft = self._answers(prompt, 1, 1).answers[0].ttft_ms
        seen = self._answers(prompt, min(at_once, status.sequences), self._tokens_left(status, prompt))
        return Compared(
            prompt_tokens=prompt,
            sequences=len(seen.answers),
            predicted_tpot_ms=plan.predicted.tpot_ms,
            measured_tpot_ms=_each(at_once, seen).tpot_ms,
            predicted_ttft_ms=plan.predicted.ttft_ms,
            measured_ttft_ms=ttft,
        ), seen.notices

    def _count(self) -> None:
        self._done += 1
        if self._on_progress is not None:
            self._on_progress(min(1.0, self._done / max(self._all, 1)))


def _each(sequences: int, seen: Seen) -> EachToken:
    tpot = statistics.median(answer.tpot_ms for answer in seen.answers)
    return EachToken(sequences, tpot, together_per_s(seen.answers))


def show(result: BenchResult) -> None:
    """For people."""
    console.print(Text.assemble((result.model, "bold"), f" · {result.n_ctx:,} tokens of context"))
    console.print("\n[bold]time to the first token[/bold]")
    console.print(_first_table(result.first_tokens))
    console.print("\n[bold]time per token[/bold]")
    console.print(_each_table(result.each_token))
    if result.devices:
        console.print("\n[bold]what each device did, with one answer at a time[/bold]")
        console.print(_share_table(result.devices))
    if result.compared is not None:
        console.print("\n[bold]predicted and measured[/bold]")
        console.print(compared_line(result.compared), soft_wrap=True)
    for line in filter(None, (slow_line(each.name, each.times) for each in result.slowdowns)):
        console.print(Text(line, "yellow"), soft_wrap=True)
    lines = [f"not measured: {line}" for line in result.left_out] + list(result.notices)
    if lines:
        console.print(Text("\n" + "\n".join(lines), style="dim"), soft_wrap=True)


def compared_line(compared: Compared) -> str:
    """ "81 ms per token (80 predicted), first token after 1.4 s (1.3 s predicted): a prompt of 512 tokens"."""
    at_once = "" if compared.sequences == 1 else f", {compared.sequences} answers at once"
    return (
        f"{milliseconds(compared.measured_tpot_ms)} per token ({milliseconds(compared.predicted_tpot_ms)} predicted), "
        f"first token after {milliseconds(compared.measured_ttft_ms)} ({milliseconds(compared.predicted_ttft_ms)} "
        f"predicted): a prompt of {compared.prompt_tokens:,} tokens{at_once}"
    )


def _table(headings: Sequence[str]) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 3, 0, 0))
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index == 0 else "right")
    return table


def _first_table(rows: Sequence[FirstToken]) -> Table:
    table = _table(("prompt", "first token after", "tokens of the prompt per second"))
    for row in rows:
        table.add_row(f"{row.prompt_tokens:,} tokens", milliseconds(row.ttft_ms), f"{row.prompt_tokens_per_s:,.0f}")
    return table


def _each_table(rows: Sequence[EachToken]) -> Table:
    table = _table(("answers at once", "per token, each", "tokens/s together"))
    for row in rows:
        table.add_row(str(row.sequences), milliseconds(row.tpot_ms), f"{row.tokens_per_s:.1f}")
    return table


def _share_table(rows: Sequence[Shares]) -> Table:
    table = _table(("device", "computing", "waiting for its disk", "network", "waiting for others"))
    for row in rows:
        cells = (f"{100 * share:.0f} %" for share in (row.compute, row.disk, row.network, row.waiting))
        table.add_row(escape(row.name), *cells)
    return table
