"""`homeinfer chat`: a conversation in the terminal."""

from __future__ import annotations

from typing import Annotated

import typer

from homeinfer.chat.session import Session
from homeinfer.chat.template import ChatTemplate
from homeinfer.cli import ui
from homeinfer.cli.opening import LocalOptions, opened
from homeinfer.cli.option_groups import with_options
from homeinfer.cli.sampling_options import SamplingOptions
from homeinfer.cli.shared_options import ModelArgument
from homeinfer.engine.answers import Teller
from homeinfer.engine.sampling import Sampler


@with_options
def chat(
    model: ModelArgument = None,
    *,
    system: Annotated[str | None, typer.Option("--system", "-s", help="How the model is to behave.")] = None,
    n_predict: Annotated[
        int, typer.Option("-n", min=-1, help="Most tokens of an answer; -1: until the model ends.")
    ] = -1,
    choosing: SamplingOptions,
    here: LocalOptions,
) -> None:
    """Talk with a model. Ctrl-C stops an answer, Ctrl-D leaves, /help shows the commands.

    A cluster that runs on this machine answers, unless another model is named. Where standard input is no terminal,
    each of its lines is a message and only the answers go to standard output.

    Examples:

      homeinfer chat

      homeinfer chat model.gguf --local-ring 3 -s "Answer in French."

      printf 'What is the capital of France?\\n' | homeinfer chat model.gguf --temp 0
    """
    sampling = choosing.sampling()
    from homeinfer.chat.terminal import keys_held_back, talk  # a quarter of the start of every other command

    with keys_held_back(), opened(model, here.ring(), local=here.local) as ready:
        Sampler(sampling, ready.tokenizer).close()  # what is wrong with a grammar is said now
        template = ChatTemplate(ready.header, ready.tokenizer)
        session = Session(ready.name, template, ready.generator, sampling, limit=n_predict, system=system)
        talk(session, ui.notes, banner(ready.name, ready.generator.teller, template))


def banner(name: str, teller: Teller, template: ChatTemplate) -> str:
    """The chat's first lines."""
    devices = teller.devices
    layers = sum(last - first for device in devices for first, last in device.windows)
    where = "1 device" if len(devices) == 1 else f"{len(devices)} devices"
    lines = [f"{name}: {layers} layers on {where}, context {teller.n_ctx:,}"]
    if not template.is_own:
        lines.append("The file holds no chat template, so it may be no chat model; it is asked in ChatML.")
    return "\n".join([*lines, "/help for commands, Ctrl-D leaves"])
