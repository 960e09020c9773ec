"""`homeinfer run`: one prompt, one answer."""

from __future__ import annotations

import sys
from typing import Annotated

import msgspec
import typer

from homeinfer.chat.reading import Reading
from homeinfer.chat.template import ChatMessage, ChatTemplate
from homeinfer.chat.text import for_terminal
from homeinfer.cli import ui
from homeinfer.cli.opening import LocalOptions, Opened, opened
from homeinfer.cli.option_groups import with_options
from homeinfer.cli.sampling_options import SamplingOptions
from homeinfer.cli.shared_options import ModelArgument
from homeinfer.engine.answers import Outcome
from homeinfer.engine.device_info import DeviceInfo
from homeinfer.engine.request import FinishReason, Sampling
from homeinfer.errors import HomeinferError


class RunResult(msgspec.Struct, frozen=True):
    """What `homeinfer run --json` prints."""

    prompt_tokens: int
    tokens: list[int]
    text: str
    finish_reason: FinishReason
    ttft_ms: float
    tpot_ms: float
    devices: list[DeviceInfo]
    seed: int


@with_options
def run(
    model: ModelArgument = None,
    *,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="What to answer; - reads it from standard input.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="How the model is to behave.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without chat template.")] = False,
    n_predict: Annotated[int, typer.Option("-n", min=-1, help="Most tokens to write; -1: one context full.")] = -1,
    choosing: SamplingOptions,
    here: LocalOptions,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text.")] = False,
) -> None:
    """Answer one prompt and leave.

    A cluster that runs on this machine answers, unless another model is named.

    Examples:

      homeinfer run model.gguf -p "What is the capital of France?"

      homeinfer run model.gguf -p "Once upon a time" --raw -n 64 --temp 0 --local-ring 3

      git diff | homeinfer run model.gguf -p - -s "Write a commit message for this change."
    """
    sampling = choosing.sampling()
    text = prompt_text(prompt)
    with opened(model, here.ring(), local=here.local, quiet=json) as ready:
        outcome = _answer(ready, prompt_tokens(ready, text, system, raw=raw), sampling, n_predict, quiet=json)
        devices = list(ready.generator.teller.devices)
    if json:
        typer.echo(msgspec.json.encode(run_result(outcome, devices, sampling.seed)))
    else:
        _show_speed(outcome)


def prompt_text(prompt: str | None) -> str:
    """The prompt as given, or from standard input. Raises HomeinferError when there is none."""
    if prompt is None and sys.stdin is not None and sys.stdin.isatty():
        raise HomeinferError("there is no prompt: give one with -p, or talk with homeinfer chat")
    text = sys.stdin.read() if prompt in (None, "-") and sys.stdin is not None else prompt
    if not text or not text.strip():
        raise HomeinferError("the prompt is empty: there is nothing to answer")
    return text


def prompt_tokens(ready: Opened, text: str, system: str | None, *, raw: bool) -> list[int]:
    """The prompt's token ids, through the chat template unless raw."""
    if raw:
        return ready.tokenizer.encode(text)
    messages = [ChatMessage("system", system)] if system else []
    return ChatTemplate(ready.header, ready.tokenizer).tokens([*messages, ChatMessage("user", text)])


def _answer(ready: Opened, tokens: list[int], sampling: Sampling, limit: int, *, quiet: bool) -> Outcome:
    """Its text goes to the screen as it comes, unless quiet."""
    with Reading(ui.notes) as reading:

        def write(piece: str) -> None:
            reading.done()
            if not quiet:
                _print(piece)

        return ready.generator.answer(tokens, sampling, limit, on_text=write)


def _show_speed(outcome: Outcome) -> None:
    typer.echo()
    rate = f"{1e3 / outcome.tpot_ms:.1f} tokens/s, " if outcome.tpot_ms else ""
    shifted = f", {outcome.shifted} tokens left the context" if outcome.shifted else ""
    ui.notes.print(f"[dim]{rate}first token after {outcome.ttft_ms / 1e3:.2f} s{shifted}[/dim]")


def run_result(outcome: Outcome, devices: list[DeviceInfo], seed: int) -> RunResult:
    """The JSON object of a run."""
    return RunResult(
        prompt_tokens=outcome.prompt_tokens,
        tokens=outcome.tokens,
        text=outcome.text,
        finish_reason=outcome.finish_reason,
        ttft_ms=outcome.ttft_ms,
        tpot_ms=outcome.tpot_ms,
        devices=devices,
        seed=seed,
    )


def _print(text: str) -> None:
    sys.stdout.write(for_terminal(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
