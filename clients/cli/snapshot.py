"""`frostgate snapshot ...`: the contract's calls on group snapshots, one a command."""

from __future__ import annotations

import sys
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from google.protobuf.duration_pb2 import Duration

from clients.cli import reading, tables
from clients.cli.following import Wait, settled
from clients.cli.pools import parse_ref
from clients.cli.reverting import Instant, NoSafety, SafetyId, begin_revert, check_reverted, confirm_revert
from clients.cli.session import (
    USAGE,
    AddressOption,
    OutputOption,
    Refusal,
    command,
    confirm,
    print_json,
    session,
)
from frostgate.v1 import group_snapshot_pb2 as pb
from frostgate.v1 import snapshot_provider_pb2 as rpc

app = typer.Typer(no_args_is_help=True, help="Group snapshots: the contract's calls, without a VM.")

Id = Annotated[str, typer.Argument(metavar="ID", help="The group snapshot; the id is yours to choose.")]
Volumes = Annotated[list[str], typer.Argument(metavar="POOL/VOLUME...", help="The volumes, all cut at one instant.")]
Labels = Annotated[list[str] | None, typer.Option("--label", "-l", metavar="KEY=VALUE", help="May be repeated.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
AllowCopy = Annotated[
    bool, typer.Option("--allow-copy", help="Volumes in use that cannot be cloned may be copied inside the cut.")
]


class Format(StrEnum):
    """Image formats."""

    RAW = "raw"
    QCOW2 = "qcow2"


FormatOption = Annotated[
    Format | None, typer.Option("--format", help="Of all the volumes; else the names and the pool tell.")
]


class Worth(StrEnum):
    """Consistencies."""

    CRASH = "crash"
    FILESYSTEM = "filesystem"
    APPLICATION = "application"


@app.command()
@command
def create(
    group_id: Id,
    volumes: Annotated[
        list[str] | None, typer.Argument(metavar="[POOL/VOLUME]...", help="Not needed when the id is prepared.")
    ] = None,
    label: Labels = None,
    image_format: FormatOption = None,
    allow_copy: AllowCopy = False,
    wait: Wait = True,
    output: OutputOption = None,
    address: AddressOption = None,
) -> None:
    """Cut a group snapshot of volumes; all or none. Repeating it is harmless.

    Nobody freezes anything here: for a running VM use `frostgate vm snapshot`.
    """
    request = rpc.CreateGroupSnapshotRequest(id=group_id)
    if volumes:
        request.spec.CopyFrom(_spec(volumes, label, image_format, allow_copy))
    with session.gateway() as gateway:
        snapshot = gateway.call("CreateGroupSnapshot", request).group_snapshot
        if wait:
            snapshot = settled(gateway, group_id, "settling")
    _print(snapshot)


@app.command()
@command
def prepare(
    group_id: Id,
    volumes: Volumes,
    label: Labels = None,
    image_format: FormatOption = None,
    allow_copy: AllowCopy = False,
    expire_after: Annotated[float, typer.Option(min=1, max=3600, help="Seconds the reservation holds.")] = 60,
    output: OutputOption = None,
    address: AddressOption = None,
) -> None:
    """Reserve an id and do everything that can be done before the cut."""
    request = rpc.PrepareGroupSnapshotRequest(id=group_id, spec=_spec(volumes, label, image_format, allow_copy))
    request.expire_after.CopyFrom(duration(expire_after))
    with session.gateway() as gateway:
        _print(gateway.call("PrepareGroupSnapshot", request).group_snapshot)


@app.command("confirm")
@command
def confirm_(
    group_id: Id,
    consistency: Annotated[Worth, typer.Option(help="What you have verified.")],
    output: OutputOption = None,
    address: AddressOption = None,
) -> None:
    """Say what a cut is worth, and keep it."""
    worth = pb.Consistency.Value(f"CONSISTENCY_{consistency.name}")
    with session.gateway() as gateway:
        request = rpc.ConfirmGroupSnapshotRequest(id=group_id, consistency=worth)
        _print(gateway.call("ConfirmGroupSnapshot", request).group_snapshot)


@app.command()
@command
def show(group_id: Id, output: OutputOption = None, address: AddressOption = None) -> None:
    """Show one group snapshot."""
    with session.gateway() as gateway:
        _print(gateway.get(group_id))


@app.command("list")
@command
def list_(
    vm: Annotated[str, typer.Option(metavar="UUID", help="Of this VM.")] = "",
    volume: Annotated[str, typer.Option(metavar="POOL/VOLUME", help="With this volume.")] = "",
    label: Labels = None,
    state: Annotated[list[str] | None, typer.Option(metavar="STATE", help="READY, COPYING, ...")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 1_000_000,
    output: OutputOption = None,
    address: AddressOption = None,
) -> None:
    """List group snapshots, newest first."""
    conditions: dict[str, Any] = {
        "vm_uuid": vm,
        "labels": labels_of(label),
        "states": [_state(name) for name in state or ()],
    }
    if volume:
        conditions["volume"] = parse_ref(volume)
    with session.gateway() as gateway:
        found = [snapshot for _, snapshot in zip(range(limit), gateway.list(**conditions), strict=False)]
    if session.json:
        print_json(list(found))
    else:
        tables.snapshots(found)


@app.command()
@command
def watch(group_id: Id, output: OutputOption = None, address: AddressOption = None) -> None:
    """Show a group snapshot's state and progress until it is READY, FAILED or gone."""
    with session.gateway() as gateway:
        if not session.json:
            _print(settled(gateway, group_id, "watching"))
            return
        for snapshot in gateway.watch(group_id):
            print_json(snapshot)


@app.command()
@command
def revert(
    group_id: Id,
    volumes: Annotated[list[str] | None, typer.Argument(metavar="[POOL/VOLUME]...", help="Only these.")] = None,
    safety_id: SafetyId = "",
    no_safety: NoSafety = False,
    instant: Instant = False,
    yes: Yes = False,
    wait: Wait = True,
    output: OutputOption = None,
    address: AddressOption = None,
) -> None:
    """Set volumes back to a group snapshot. The present state is kept first, so that it can be undone."""
    what = f"{len(volumes)} volumes" if volumes else "all volumes"
    confirm_revert(f"Set {what} of {group_id} back?", no_safety=no_safety, yes=yes)
    with session.gateway() as gateway:
        snapshot = begin_revert(gateway, group_id, volumes or [], safety_id, no_safety=no_safety, instant=instant)
        if wait:
            snapshot = settled(gateway, group_id, "reverting")
    _print(snapshot)
    check_reverted(snapshot)


@app.command()
@command
def delete(
    group_ids: Annotated[list[str], typer.Argument(metavar="ID...", help="The group snapshots.")],
    yes: Yes = False,
    wait: Wait = True,
    output: OutputOption = None,
    address: AddressOption = None,
) -> None:
    """Delete group snapshots; one that does not exist is fine."""
    confirm(f"Delete {', '.join(group_ids)} for good?", yes=yes)
    with session.gateway() as gateway:
        outcomes = {group_id: gateway.delete(group_id, wait=wait) for group_id in group_ids}
    if session.json:
        print_json({group_id: "deleted" if existed else "missing" for group_id, existed in outcomes.items()})
        return
    for group_id, existed in outcomes.items():
        print(f"{group_id}: {'deleted' if existed else 'there was none'}")


@app.command()
@command
def clone(
    group_id: Id,
    clones: Annotated[
        list[str], typer.Argument(metavar="POOL/VOLUME=NEW...", help="Members, and the new volumes' names.")
    ],
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait; the work goes on in the gateway.")] = 3600.0,
    output: OutputOption = None,
    address: AddressOption = None,
) -> None:
    """Make new volumes from members, in the members' pools. Repeating it is harmless."""
    request = rpc.CloneGroupSnapshotRequest(id=group_id)
    for word in clones:
        source, separator, target = word.rpartition("=")
        if not separator:
            raise Refusal(f"{word!r} is not POOL/VOLUME=NEW", USAGE)
        request.clones.add(source=parse_ref(source), target_volume=target)
    with session.gateway() as gateway:
        made = gateway.call("CloneGroupSnapshot", request, timeout_s=timeout).volumes
    if session.json:
        print_json(list(made))
    else:
        tables.show(("VOLUME", "SIZE"), ((tables.ref(volume.ref), tables.size(volume.size_bytes)) for volume in made))


@app.command()
@command
def read(
    group_id: Id,
    volume: Annotated[str, typer.Argument(metavar="POOL/VOLUME", help="The member.")],
    to: Annotated[str, typer.Option("--to", "-o", metavar="FILE", help="Where to; - is standard output.")],
    offset: Annotated[int, typer.Option(min=0, help="First byte.")] = 0,
    length: Annotated[int, typer.Option(min=0, help="Bytes; 0 means to the end.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
    address: AddressOption = None,
) -> None:
    """Copy the bytes of a member, as the guest saw them, to a file; holes stay holes."""
    request = rpc.ReadBlocksRequest(id=group_id, volume=parse_ref(volume), offset=offset, length=length)
    with session.gateway() as gateway:
        members = {tables.ref(member.volume): member.size_bytes for member in gateway.get(group_id).members}
        total = length or max(members.get(volume, 0) - offset, 0)
        parts = gateway.stream("ReadBlocks", request)
        if to == "-":
            if sys.stdout.isatty():
                raise Refusal("a disk's bytes are not for a terminal: name a file with --to", USAGE)
            reading.to_stream(parts, sys.stdout.buffer, total)
        else:
            reading.to_file(parts, Path(to), offset, total, replace=force)


@app.command()
@command
def extents(
    group_id: Id,
    volume: Annotated[str, typer.Argument(metavar="POOL/VOLUME", help="The member.")],
    since: Annotated[
        str, typer.Option(metavar="ID", help="Only what changed since this older snapshot of the volume.")
    ] = "",
    coarse: Annotated[
        bool, typer.Option("--coarse", help="With --since: by the storage's own granularity, faster.")
    ] = False,
    output: OutputOption = None,
    address: AddressOption = None,
) -> None:
    """List the ranges of a member that are not holes, or that changed since an older snapshot."""
    ref = parse_ref(volume)
    if coarse and not since:
        raise Refusal("--coarse needs --since", USAGE)
    with session.gateway() as gateway:
        if since:
            changes = rpc.ListChangedExtentsRequest(id=group_id, volume=ref, base_id=since, coarse=coarse)
            responses = gateway.stream("ListChangedExtents", changes)
        else:
            responses = gateway.stream("ListAllocatedExtents", rpc.ListAllocatedExtentsRequest(id=group_id, volume=ref))
        found = [extent for response in responses for extent in response.extents]
    if session.json:
        print_json(list(found))
    else:
        tables.show(("OFFSET", "LENGTH"), ((str(extent.offset), str(extent.length)) for extent in found))


def duration(seconds: float) -> Duration:
    """Return seconds as the contract has them."""
    result = Duration()
    result.FromTimedelta(timedelta(seconds=seconds))
    return result


def _spec(
    volumes: list[str], label: list[str] | None, image_format: Format | None, allow_copy: bool
) -> pb.GroupSnapshotSpec:
    shown = image_format.value if image_format else ""
    return pb.GroupSnapshotSpec(
        volumes=[pb.VolumeSpec(ref=parse_ref(volume), format=shown) for volume in volumes],
        labels=labels_of(label),
        allow_copy=allow_copy,
    )


def labels_of(label: list[str] | None) -> dict[str, str]:
    """Return labels from "KEY=VALUE" words. Raises Refusal."""
    labels = {}
    for text in label or ():
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise Refusal(f"--label: {text!r} is not KEY=VALUE", USAGE)
        labels[key] = value
    return labels


def _state(name: str) -> Any:
    try:
        return pb.GroupSnapshotState.Value(f"GROUP_SNAPSHOT_STATE_{name.upper()}")
    except ValueError:
        known = [key.removeprefix("GROUP_SNAPSHOT_STATE_") for key in pb.GroupSnapshotState.keys()[1:]]
        raise Refusal(f"--state: {name!r} is not one of {', '.join(known)}", USAGE) from None


def _print(snapshot: pb.GroupSnapshot) -> None:
    if session.json:
        print_json(snapshot)
    else:
        tables.snapshot(snapshot)
