"""`frostgate vm ...`: snapshots of libvirt VMs, by the coordinator."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.tree import Tree

from clients.cli import tables
from clients.cli.doctor import DEFAULT_CONNECT
from clients.cli.following import Wait, settled
from clients.cli.reverting import Instant, NoSafety, SafetyId, begin_revert, check_reverted, confirm_revert
from clients.cli.session import (
    FAILED,
    USAGE,
    AddressOption,
    OutputOption,
    Refusal,
    command,
    confirm,
    plain,
    print_json,
    printable,
    session,
)
from clients.cli.snapshot import Labels, Yes, labels_of
from clients.gateway import Gateway
from frostgate.v1 import group_snapshot_pb2 as pb

try:
    from clients.coordinator import domains, retention, reverting, taking
    from clients.coordinator.quiet import Quiesce
except ImportError as error:
    if error.name not in ("libvirt", "libvirt_qemu", "libvirtmod", "libvirtmod_qemu"):
        raise
    print("error: `frostgate vm` needs libvirt's Python binding (Debian: python3-libvirt)", file=sys.stderr)
    raise SystemExit(FAILED) from None

app = typer.Typer(no_args_is_help=True, help="Snapshots of libvirt VMs.")

Name = Annotated[str, typer.Argument(metavar="VM", help="The domain's name or UUID.")]
Connect = Annotated[
    str, typer.Option("--connect", "-c", metavar="URI", envvar="LIBVIRT_DEFAULT_URI", help="libvirt's URI.")
]


@app.command()
@command
def snapshot(
    vm: Name,
    group_id: Annotated[str, typer.Option("--id", help="Id of the snapshot. [default: name and time]")] = "",
    quiesce: Annotated[
        Quiesce,
        typer.Option(
            help="required: freeze by the guest agent, or refuse. preferred: pause the vCPUs when there is no agent. "
            "none: neither (one disk, or a storage that cuts all at once)."
        ),
    ] = Quiesce.REQUIRED,
    max_freeze: Annotated[
        float, typer.Option(min=0.5, max=60, help="Seconds after which the guard thaws the guest, whatever happens.")
    ] = 5.0,
    exclude: Annotated[list[str] | None, typer.Option(metavar="DISK", help="Leave out a disk: vdb.")] = None,
    label: Labels = None,
    allow_copy: Annotated[
        bool, typer.Option("--allow-copy", help="Copy inside the freeze window where nothing else can be done.")
    ] = False,
    wait: Wait = True,
    connect: Connect = DEFAULT_CONNECT,
    output: OutputOption = None,
    address: AddressOption = None,
) -> None:
    """Snapshot a VM: all its disks at one instant, the guest frozen for that instant only."""
    wish = taking.Wish(group_id, quiesce, max_freeze, exclude or (), labels_of(label), allow_copy)
    with session.gateway() as gateway:
        taken = taking.take(gateway, connect, vm, wish, _say)
        shown = settled(gateway, taken.snapshot.id, "settling") if wait else taken.snapshot
    if session.json:
        window = {key: round(value, 6) for key, value in asdict(taken.window).items() if key.endswith("_s")}
        skipped = [{"disk": disk.target, "reason": disk.skipped} for disk in taken.skipped]
        print_json({"group_snapshot": plain(shown), "window": window, "skipped": skipped})
        return
    tables.snapshot(shown)
    print()
    for disk in taken.skipped:
        print(f"disk {printable(disk.target)} {disk.skipped} and is no part of it")
    if taken.window.window_s:
        print(
            f"frozen for {taken.window.window_s * 1000:.0f} ms (freeze {taken.window.freeze_s * 1000:.0f}, "
            f"cut {shown.cut_duration.ToNanoseconds() / 1e6:.1f}, thaw {taken.window.thaw_s * 1000:.0f})"
        )


@app.command("list")
@command
def list_(
    vm: Name, connect: Connect = DEFAULT_CONNECT, output: OutputOption = None, address: AddressOption = None
) -> None:
    """Show a VM's snapshots as a tree, with the one that its disks descend from."""
    with session.gateway() as gateway:
        found = _snapshots(gateway, connect, vm)
    if session.json:
        print_json(list(found))
    elif not found:
        print("no snapshots")
    elif not sys.stdout.isatty():
        tables.show(
            ("ID", "PARENT", "STATE", "CONSISTENCY", "CUT", "CURRENT"),
            (
                (
                    s.id,
                    s.vm.parent_id or "-",
                    tables.state(s),
                    tables.consistency(s),
                    tables.time(s.cut_time),
                    "*" * s.vm.current,
                )
                for s in found
            ),
        )
    else:
        Console().print(_tree(found))


@app.command()
@command
def revert(
    vm: Name,
    group_id: Annotated[str, typer.Argument(metavar="ID", help="The snapshot.")],
    stop: Annotated[
        bool, typer.Option("--stop", help="Stop the VM if it runs, and start it again afterwards.")
    ] = False,
    shutdown_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds for the guest to shut down before it is turned off.")
    ] = 30.0,
    safety_id: SafetyId = "",
    no_safety: NoSafety = False,
    instant: Instant = False,
    yes: Yes = False,
    connect: Connect = DEFAULT_CONNECT,
    output: OutputOption = None,
    address: AddressOption = None,
) -> None:
    """Set a VM's disks back to a snapshot. The present state is kept first, so that it can be undone."""
    confirm_revert(f"Set the disks of {vm} back to {group_id}?", no_safety=no_safety, yes=yes)
    with session.gateway() as gateway:
        found = gateway.get(group_id)
        uuid = _uuid(connect, vm)
        if found.vm.uuid != uuid:
            raise Refusal(f"{group_id} is no snapshot of {vm} but of {found.vm.name or 'no VM'}", USAGE)
        with reverting.stopped(connect, uuid, stop=stop, shutdown_s=shutdown_timeout, say=_say):
            begin_revert(gateway, group_id, [], safety_id, no_safety=no_safety, instant=instant)
            done = settled(gateway, group_id, "reverting")
            check_reverted(done)
    if session.json:
        print_json(done)
    else:
        print(f"{vm} is back at {group_id}")


@app.command()
@command
def delete(
    group_ids: Annotated[list[str], typer.Argument(metavar="ID...", help="The snapshots.")],
    yes: Yes = False,
    wait: Wait = True,
    output: OutputOption = None,
    address: AddressOption = None,
) -> None:
    """Delete snapshots; the children of a deleted one become its parent's."""
    from clients.cli.snapshot import delete as delete_groups

    delete_groups(group_ids, yes=yes, wait=wait)


@app.command()
@command
def prune(
    vm: Name,
    keep_last: Annotated[int, typer.Option(min=0, help="Keep the newest so many.")] = 0,
    keep_daily: Annotated[int, typer.Option(min=0, help="Keep the newest of each of so many days.")] = 0,
    keep_weekly: Annotated[int, typer.Option(min=0, help="... weeks.")] = 0,
    keep_monthly: Annotated[int, typer.Option(min=0, help="... months.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    yes: Yes = False,
    connect: Connect = DEFAULT_CONNECT,
    output: OutputOption = None,
    address: AddressOption = None,
) -> None:
    """Delete the snapshots of a VM that no rule keeps."""
    policy = retention.Policy(keep_last, keep_daily, keep_weekly, keep_monthly)
    if policy == retention.Policy():
        raise Refusal("say what to keep: --keep-last, --keep-daily, --keep-weekly or --keep-monthly", USAGE)
    with session.gateway() as gateway:
        victims = [found.id for found in retention.to_delete(_snapshots(gateway, connect, vm), policy)]
        if victims and not dry_run:
            confirm(f"Delete {len(victims)} snapshots of {vm}: {', '.join(victims)}?", yes=yes)
            for victim in victims:
                gateway.delete(victim)
    if session.json:
        print_json({"dry_run": dry_run, "deleted": list(victims)})
        return
    for victim in victims:
        print(f"{victim}: {'would be deleted' if dry_run else 'deleted'}")
    if not victims:
        print("nothing to delete")


@app.command()
@command
def thaw(vm: Name, connect: Connect = DEFAULT_CONNECT) -> None:
    """Thaw a guest that somebody left frozen; harmless when it is not."""
    domain = domains.find(domains.connect(connect), vm)
    if not domain.isActive():
        raise Refusal(f"VM {vm} does not run")
    import libvirt

    try:
        count = domain.fsThaw()
    except libvirt.libvirtError as error:
        raise Refusal(f"VM {vm} could not be thawed: {error}; a reset of the VM is the last resort") from None
    print(f"{count} file systems thawed" if count else "it was not frozen")


def _say(text: str) -> None:
    if sys.stderr.isatty() and not session.json:
        print(text, file=sys.stderr)


def _uuid(uri: str, vm: str) -> str:
    """Return the UUID of a VM by name; a UUID is taken as it is, also when libvirt knows it no more."""
    from uuid import UUID

    try:
        return str(UUID(vm))
    except ValueError:
        found: str = domains.find(domains.connect(uri), vm).UUIDString()
        return found


def _snapshots(gateway: Gateway, uri: str, vm: str) -> list[pb.GroupSnapshot]:
    return list(gateway.list(vm_uuid=_uuid(uri, vm)))


def _tree(found: Sequence[pb.GroupSnapshot]) -> Tree:
    """Return the snapshots below their parents, oldest first."""
    root = Tree(escape(printable(found[0].vm.name)))
    known = {snapshot.id for snapshot in found}
    nodes: dict[str, Any] = {}
    waiting = sorted(found, key=lambda snapshot: snapshot.create_time.ToNanoseconds())
    while waiting:
        later = []
        for snapshot in waiting:
            parent = snapshot.vm.parent_id
            if parent in known and parent not in nodes and parent != snapshot.id:
                later.append(snapshot)
                continue
            nodes[snapshot.id] = nodes.get(parent, root).add(_line(snapshot))
        if len(later) == len(waiting):
            for snapshot in later:  # a circle cannot be, but must not hang us
                root.add(_line(snapshot))
            break
        waiting = later
    return root


def _line(snapshot: pb.GroupSnapshot) -> str:
    current = " [bold green]<- current[/]" if snapshot.vm.current else ""
    words = f"{snapshot.id}  {tables.time(snapshot.cut_time)}  {tables.consistency(snapshot)} {tables.state(snapshot)}"
    return escape(printable(words)) + current
