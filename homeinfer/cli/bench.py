"""`homeinfer bench`: what the running cluster really does, beside what was predicted."""

from __future__ import annotations

from typing import Annotated

import typer

from homeinfer.cli.shared_options import JsonOption


def bench(
    tokens: Annotated[
        int, typer.Option("-n", min=2, max=1000, help="Tokens of each answer that is timed for its time per token.")
    ] = 32,
    json: JsonOption = False,
) -> None:
    """Measure the cluster that runs on this machine.

    Time to the first token of prompts of 16, 512 and 4,096 tokens, time per token with 1 to 8 answers at once, what
    each device did meanwhile, and what the plan had predicted. Other answers that run at the same time are in the way.

    Examples:

      homeinfer bench

      homeinfer bench -n 128 --json > bench.json
    """
    from homeinfer.cli.cluster_bench import measure, show

    result = measure(tokens)
    if json:
        import msgspec

        typer.echo(msgspec.json.encode(result))
    else:
        show(result)
