"""What `homeinfer cluster` asks a running cluster, or tells it to do."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import msgspec
import typer

from homeinfer.cli.cluster_leave import has_ended, joined_head
from homeinfer.cli.cluster_view import cluster_view, code_view, registered_table
from homeinfer.cli.ui import console, notes
from homeinfer.cluster.client import ClusterClient, find_cluster, need_cluster
from homeinfer.cluster.coordinator.running import running_cluster
from homeinfer.cluster.members import Members
from homeinfer.cluster.wire.client import DeviceStatus
from homeinfer.errors import HomeinferError
from homeinfer.folders import state_folder

_DOWN_SECONDS = 60.0
_CODE_SECONDS = 5.0
_SILENT_SECONDS = 1.5


def show_status(*, json: bool) -> None:
    """Raises HomeinferError when no cluster runs here."""
    with _cluster() as client:
        status = client.status()
    if json:
        typer.echo(msgspec.json.encode(status))
        return
    console.print(cluster_view(status))


def show_devices(*, json: bool) -> None:
    """Those of the running cluster, or those that are paired with a head that rests."""
    client = find_cluster()
    if client is None:
        _check_head()
        found = tuple(DeviceStatus(member.name, "left") for member in Members(state_folder()).all())
    else:
        with contextlib.closing(client):
            found = client.status().devices
    if json:
        typer.echo(msgspec.json.encode(found))
    elif found:
        console.print(registered_table(found))
    else:
        console.print("no device is paired with this machine yet: homeinfer cluster up shows a code for it")


def show_plan(*, json: bool) -> None:
    """Raises HomeinferError when no cluster runs here, or it has no plan yet."""
    with _cluster() as client:
        plan = client.plan()
    if plan is None:
        raise HomeinferError("there is no plan yet: homeinfer cluster status says what the cluster is doing")
    if json:
        typer.echo(msgspec.json.encode(plan))
        return
    from homeinfer.cli.plan_tables import show_report

    show_report(plan, has_advice=False)


def new_code() -> None:
    """Raises HomeinferError when no cluster runs here."""
    with _cluster() as client:
        before = client.status().code
        client.order("code")
        deadline = time.monotonic() + _CODE_SECONDS
        while (status := client.status()).code in (None, before):
            if time.monotonic() > deadline:
                said = [line for line in status.events if line.startswith("no pairing code")]
                raise HomeinferError(said[-1] if said else "no pairing code could be made within 5 s: try again")
            time.sleep(0.05)
    assert status.code is not None
    console.print(code_view(status.code), soft_wrap=True)


def forget_device(name: str) -> None:
    """Raises HomeinferError for a device that is not known."""
    client = find_cluster()
    if client is None:
        Members(state_folder()).forget(name)
    else:
        with contextlib.closing(client):
            client.order("forget", name)
    console.print(f"{name} is forgotten: it needs a new code to come back", markup=False)


def take_down() -> None:
    """Returns when its process has ended. Raises HomeinferError when it does not."""
    cluster = running_cluster(state_folder())
    with _cluster() as client:
        client.order("down")
    if cluster is not None and not has_ended(cluster.pid, cluster.began, _SILENT_SECONDS):
        notes.print("ending the cluster")
    if cluster is not None and not has_ended(cluster.pid, cluster.began, _DOWN_SECONDS):
        raise HomeinferError(
            f"the cluster was told to end but process {cluster.pid} still runs after {_DOWN_SECONDS:.0f} s: end it"
        )
    console.print("the cluster is down")


def _check_head() -> None:
    head = joined_head(state_folder())
    if head is not None:
        raise HomeinferError(f"this machine takes part in the cluster of {head}: ask there")


@contextlib.contextmanager
def _cluster() -> Iterator[ClusterClient]:
    _check_head()
    with contextlib.closing(need_cluster()) as client:
        yield client
