"""`homeinfer cluster`: several machines as one. What each command does is imported when it is called."""

from __future__ import annotations

import typer

from homeinfer.cli.cluster_options import DeviceArgument, JoinOptions, LeftHeadOption, UpOptions
from homeinfer.cli.option_groups import with_options
from homeinfer.cli.shared_options import JsonOption, ModelArgument

cluster = typer.Typer(
    name="cluster",
    help="Run a model on several machines together. On one: homeinfer cluster up. On the others: homeinfer cluster "
    "join. Then, on the first: homeinfer chat.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@cluster.command()
@with_options
def up(model: ModelArgument = None, *, options: UpOptions) -> None:
    """Bring a cluster up, with this machine as its head.

    Shows a code with which other machines join, the devices as they come, what each would do with the model, and then
    how they are doing. Ctrl-C ends the cluster. Without --devices and --wait it waits a moment for the devices that are
    paired already.

    Examples:

      homeinfer cluster up model.gguf

      homeinfer cluster up model.gguf --devices 3 --ctx 16384

      homeinfer cluster up model.gguf --wait 60 --sequences 4 --detach
    """
    from homeinfer.cli.cluster_up import bring_up

    bring_up(model, options)


@cluster.command()
@with_options
def join(*, options: JoinOptions) -> None:
    """Let this machine take part in a cluster, until Ctrl-C.

    The first time with the code that homeinfer cluster up shows, later without. It waits for the head when that is
    not there, so it may be started before it, and stay.

    Examples:

      homeinfer cluster join ABCD-EFGH-…

      homeinfer cluster join

      homeinfer cluster join --stay --models ~/models
    """
    from homeinfer.cli.cluster_join import take_part

    take_part(options)


@cluster.command()
def status(json: JsonOption = False) -> None:
    """Show the cluster that runs on this machine: its state, its devices, what each is doing.

    Examples:

      homeinfer cluster status

      homeinfer cluster status --json | jq .tokens_per_s
    """
    from homeinfer.cli.cluster_orders import show_status

    show_status(json=json)


@cluster.command()
def devices(json: JsonOption = False) -> None:
    """Show the devices that are paired with this machine, and which of them are there.

    Example: homeinfer cluster devices
    """
    from homeinfer.cli.cluster_orders import show_devices

    show_devices(json=json)


@cluster.command()
def plan(json: JsonOption = False) -> None:
    """Show the plan that runs: who holds which layers, how fast that should be, who is left out and why.

    Examples:

      homeinfer cluster plan

      homeinfer cluster plan --json > plan.json
    """
    from homeinfer.cli.cluster_orders import show_plan

    show_plan(json=json)


@cluster.command()
def code() -> None:
    """Make a new code with which another machine can join; it holds for ten minutes.

    Example: homeinfer cluster code
    """
    from homeinfer.cli.cluster_orders import new_code

    new_code()


@cluster.command()
def leave(head: LeftHeadOption = "") -> None:
    """Let this machine leave the cluster for good: what it runs for it ends, and its head is forgotten.

    To come back takes a new code. To leave for a while, press Ctrl-C where homeinfer cluster join runs.

    Example: homeinfer cluster leave
    """
    from homeinfer.cli.cluster_leave import leave_for_good

    leave_for_good(head)


@cluster.command()
def forget(device: DeviceArgument) -> None:
    """Forget a device that was paired with this machine: it can't join any more without a new code.

    Example: homeinfer cluster forget laptop
    """
    from homeinfer.cli.cluster_orders import forget_device

    forget_device(device)


@cluster.command()
def down() -> None:
    """End the cluster that runs on this machine; the other devices let go of the model.

    Example: homeinfer cluster down
    """
    from homeinfer.cli.cluster_orders import take_down

    take_down()
