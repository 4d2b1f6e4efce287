"""Checks of every field of every request, before anything else sees it.

One function per request. Each collects all violations and raises BadInput with the field's path as a client
writes it: ``spec.volumes[1].ref.volume``. The limits are those that the proto files promise.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from frostgate.v1 import group_snapshot_pb2 as pb
from frostgate.v1 import snapshot_provider_pb2 as rpc
from frostgate.v1 import volume_pb2
from gateway.errors import BadInput

M = TypeVar("M", bound=Message)

MAX_VOLUMES = 128
MAX_LABELS = 64
MAX_PAGE = 1000
MAX_XML_BYTES = 1024 * 1024

_GROUP_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
_POOL = re.compile(r"[a-z0-9-]{1,63}", re.ASCII)
_LABEL_KEY = re.compile(r"[A-Za-z0-9._/-]{1,63}", re.ASCII)
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)
_HOST = re.compile(r"[A-Za-z0-9._-]{1,255}", re.ASCII)
_TARGET = re.compile(r"[a-z0-9]{1,32}", re.ASCII)
_RBD = re.compile(r"[^/@\x00-\x1f\x7f]{1,128}(/[^/@\x00-\x1f\x7f]{1,128}){1,2}")
_MONITOR = re.compile(r"[A-Za-z0-9._:\[\]-]{1,262}", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class _Violations:
    """What is wrong with a request so far."""

    def __init__(self) -> None:
        self.found: list[tuple[str, str]] = []

    def say(self, field: str, problem: str) -> None:
        """Add a violation."""
        self.found.append((field, problem))

    def group_id(self, field: str, value: str) -> None:
        if not value:
            self.say(field, "is required")
        elif not _GROUP_ID.fullmatch(value) or ".." in value:
            self.say(field, "has to be 1..128 of [A-Za-z0-9._-], begin with a letter or digit, and not contain '..'")

    def pool(self, field: str, value: str) -> None:
        if not value:
            self.say(field, "is required")
        elif not _POOL.fullmatch(value):
            self.say(field, "has to be 1..63 of [a-z0-9-]")

    def volume_name(self, field: str, value: str) -> None:
        if not value:
            self.say(field, "is required")
        elif len(value.encode()) > 255:
            self.say(field, "is longer than 255 bytes")
        elif "/" in value or ".." in value or value[0] in ".-" or _CONTROL.search(value):
            self.say(field, "has '/', '..', a control character, or a leading '.' or '-'")

    def ref(self, field: str, message: Message, value: volume_pb2.VolumeRef) -> None:
        if not message.HasField(field.rpartition(".")[2]):
            self.say(field, "is required")
            return
        self.ref_content(field, value)

    def ref_content(self, field: str, value: volume_pb2.VolumeRef) -> None:
        self.pool(f"{field}.pool", value.pool)
        self.volume_name(f"{field}.volume", value.volume)

    def text(self, field: str, value: str, most_bytes: int, *, required: bool) -> None:
        if required and not value:
            self.say(field, "is required")
        elif len(value.encode()) > most_bytes:
            self.say(field, f"is longer than {most_bytes} bytes")
        elif _CONTROL.search(value):
            self.say(field, "has a control character")

    def labels(self, field: str, labels: Any) -> None:
        if len(labels) > MAX_LABELS:
            self.say(field, f"has more than {MAX_LABELS} entries")
            return
        for key, value in sorted(labels.items()):
            if not _LABEL_KEY.fullmatch(key):
                self.say(f'{field}["{key[:64]}"]', "the key has to be 1..63 of [A-Za-z0-9._/-]")
            elif len(value.encode()) > 1024 or "\x00" in value:
                self.say(f'{field}["{key}"]', "is longer than 1024 bytes or has a NUL")

    def page(self, size: int, token: str) -> None:
        if not 0 <= size <= MAX_PAGE:
            self.say("page_size", f"has to be 0..{MAX_PAGE}")
        if token and decoded_token(token) is None:
            self.say("page_token", "is not a next_page_token of this gateway")

    def within(self, field: str, message: Message, value: Duration) -> None:
        if message.HasField(field) and not 1 <= seconds(value) <= 3600:
            self.say(field, "has to be 1 s .. 3600 s")

    def count(self, field: str, values: Any, *, least: int, most: int = MAX_VOLUMES) -> bool:
        if len(values) < least:
            self.say(field, "is required")
        elif len(values) > most:
            self.say(field, f"has more than {most} entries")
        else:
            return True
        return False

    def refs(self, field: str, refs: Any) -> None:
        seen = set()
        for index, ref in enumerate(refs):
            self.ref_content(f"{field}[{index}]", ref)
            if (ref.pool, ref.volume) in seen:
                self.say(f"{field}[{index}]", "is named twice")
            seen.add((ref.pool, ref.volume))

    def spec(self, spec: pb.GroupSnapshotSpec) -> None:
        if self.count("spec.volumes", spec.volumes, least=1):
            seen = set()
            for index, volume in enumerate(spec.volumes):
                field = f"spec.volumes[{index}]"
                self.ref(f"{field}.ref", volume, volume.ref)
                if volume.format not in ("", "raw", "qcow2"):
                    self.say(f"{field}.format", 'has to be "raw", "qcow2" or empty')
                if volume.HasField("attachment"):
                    self.attachment(f"{field}.attachment", volume.attachment)
                if (volume.ref.pool, volume.ref.volume) in seen:
                    self.say(f"{field}.ref", "is named twice")
                seen.add((volume.ref.pool, volume.ref.volume))
        self.labels("spec.labels", spec.labels)
        if spec.HasField("vm"):
            self.vm(spec.vm)

    def attachment(self, field: str, given: pb.VolumeAttachment) -> None:
        if not _HOST.fullmatch(given.hypervisor):
            self.say(f"{field}.hypervisor", "has to be 1..255 of [A-Za-z0-9._-]")
        if not _UUID.fullmatch(given.domain):
            self.say(f"{field}.domain", "has to be a UUID, 8-4-4-4-12 in lower case")
        if not _TARGET.fullmatch(given.disk):
            self.say(f"{field}.disk", "has to be a disk's target such as vda: 1..32 of [a-z0-9]")

    def vm(self, vm: pb.VmRecord) -> None:
        if not _UUID.fullmatch(vm.uuid):
            self.say("spec.vm.uuid", "has to be a UUID, 8-4-4-4-12 in lower case")
        self.text("spec.vm.name", vm.name, 255, required=True)
        if len(vm.domain_xml.encode()) > MAX_XML_BYTES:
            self.say("spec.vm.domain_xml", "is longer than 1 MiB")
        elif "\x00" in vm.domain_xml:
            self.say("spec.vm.domain_xml", "has a NUL")
        for field, given in (("parent_id", bool(vm.parent_id)), ("current", vm.current)):
            if given:
                self.say(f"spec.vm.{field}", "is output only")

    def source(self, field: str, source: volume_pb2.DiskSource) -> None:
        kind = source.WhichOneof("source")
        if kind is None:
            self.say(field, "one of file, rbd and block_device is required")
        elif kind == "rbd":
            if not _RBD.fullmatch(source.rbd.name):
                self.say(f"{field}.rbd.name", 'has to be "pool/image" or "pool/namespace/image"')
            if len(source.rbd.monitors) > 16:
                self.say(f"{field}.rbd.monitors", "has more than 16 entries")
            for index, monitor in enumerate(source.rbd.monitors):
                if not _MONITOR.fullmatch(monitor):
                    self.say(f"{field}.rbd.monitors[{index}]", "is neither host nor host:port")
        else:
            path = source.file if kind == "file" else source.block_device
            if not PurePosixPath(path).is_absolute() or len(path.encode()) > 4096 or "\x00" in path:
                self.say(f"{field}.{kind}", "has to be an absolute path of at most 4096 bytes")


def seconds(value: Duration) -> float:
    """Return a Duration in seconds."""
    return value.seconds + value.nanos / 1e9


def page_token(position: str) -> str:
    """Return an opaque page token for a position in a listing."""
    return base64.urlsafe_b64encode(f"1:{position}".encode()).decode()


def decoded_token(token: str) -> str | None:
    """Return the position that page_token() packed, or None when it is no such token."""
    try:
        version, colon, position = (
            base64.b64decode(token.encode(), altchars=b"-_", validate=True).decode().partition(":")
        )
    except (ValueError, binascii.Error):
        return None
    return position if (version, colon) == ("1", ":") and position else None


def check(request: Message) -> None:
    """Check a request of any call. Raises BadInput with every violation."""
    wrong = _Violations()
    _CHECKS[type(request)](wrong, request)
    if wrong.found:
        raise BadInput(wrong.found)


def _list_volumes(wrong: _Violations, request: rpc.ListVolumesRequest) -> None:
    wrong.pool("pool", request.pool)
    wrong.page(request.page_size, request.page_token)


def _resolve(wrong: _Violations, request: rpc.ResolveVolumesRequest) -> None:
    if wrong.count("sources", request.sources, least=1):
        for index, source in enumerate(request.sources):
            wrong.source(f"sources[{index}]", source)


def _prepare(wrong: _Violations, request: rpc.PrepareGroupSnapshotRequest) -> None:
    wrong.group_id("id", request.id)
    if request.HasField("spec"):
        wrong.spec(request.spec)
    else:
        wrong.say("spec", "is required")
    wrong.within("expire_after", request, request.expire_after)


def _create(wrong: _Violations, request: rpc.CreateGroupSnapshotRequest) -> None:
    wrong.group_id("id", request.id)
    if request.HasField("spec"):
        wrong.spec(request.spec)
    wrong.within("confirm_within", request, request.confirm_within)


def _confirm(wrong: _Violations, request: rpc.ConfirmGroupSnapshotRequest) -> None:
    wrong.group_id("id", request.id)
    if request.consistency not in (pb.CONSISTENCY_CRASH, pb.CONSISTENCY_FILESYSTEM, pb.CONSISTENCY_APPLICATION):
        wrong.say("consistency", "has to be CRASH, FILESYSTEM or APPLICATION")


def _list_groups(wrong: _Violations, request: rpc.ListGroupSnapshotsRequest) -> None:
    wrong.page(request.page_size, request.page_token)
    position = decoded_token(request.page_token) if request.page_token else None
    if position is not None and not (position.isascii() and position.isdecimal() and len(position) < 19):
        wrong.say("page_token", "is not a next_page_token of this call")
    if request.vm_uuid and not _UUID.fullmatch(request.vm_uuid):
        wrong.say("vm_uuid", "has to be a UUID, 8-4-4-4-12 in lower case")
    if request.HasField("volume"):
        wrong.ref_content("volume", request.volume)
    wrong.labels("labels", request.labels)
    if wrong.count("states", request.states, least=0, most=16):
        for index, state in enumerate(request.states):
            if state not in pb.GroupSnapshotState.values() or state == 0:
                wrong.say(f"states[{index}]", "is not a state")


def _revert(wrong: _Violations, request: rpc.RevertGroupSnapshotRequest) -> None:
    wrong.group_id("id", request.id)
    if wrong.count("volumes", request.volumes, least=0):
        wrong.refs("volumes", request.volumes)
    if request.safety_id:
        wrong.group_id("safety_id", request.safety_id)
        if request.safety_id == request.id:
            wrong.say("safety_id", "has to differ from id")
        if request.no_safety:
            wrong.say("safety_id", "contradicts no_safety")


def _clone(wrong: _Violations, request: rpc.CloneGroupSnapshotRequest) -> None:
    wrong.group_id("id", request.id)
    if wrong.count("clones", request.clones, least=1):
        for index, clone in enumerate(request.clones):
            wrong.ref(f"clones[{index}].source", clone, clone.source)
            wrong.volume_name(f"clones[{index}].target_volume", clone.target_volume)


def _read(wrong: _Violations, request: rpc.ReadBlocksRequest) -> None:
    wrong.group_id("id", request.id)
    wrong.ref("volume", request, request.volume)


def _allocated(wrong: _Violations, request: rpc.ListAllocatedExtentsRequest) -> None:
    wrong.group_id("id", request.id)
    wrong.ref("volume", request, request.volume)


def _changed(wrong: _Violations, request: rpc.ListChangedExtentsRequest) -> None:
    wrong.group_id("id", request.id)
    wrong.ref("volume", request, request.volume)
    if request.base_id:
        wrong.group_id("base_id", request.base_id)


def _only_id(wrong: _Violations, request: Any) -> None:
    wrong.group_id("id", request.id)


def _nothing(_wrong: _Violations, _request: Message) -> None:
    pass


_CHECKS: dict[type[Message], Callable[[_Violations, Any], None]] = {
    rpc.ListPoolsRequest: _nothing,
    rpc.ListVolumesRequest: _list_volumes,
    rpc.GetVolumeRequest: lambda wrong, request: wrong.ref("ref", request, request.ref),
    rpc.ResolveVolumesRequest: _resolve,
    rpc.PrepareGroupSnapshotRequest: _prepare,
    rpc.CreateGroupSnapshotRequest: _create,
    rpc.ConfirmGroupSnapshotRequest: _confirm,
    rpc.GetGroupSnapshotRequest: _only_id,
    rpc.ListGroupSnapshotsRequest: _list_groups,
    rpc.WatchGroupSnapshotRequest: _only_id,
    rpc.RevertGroupSnapshotRequest: _revert,
    rpc.DeleteGroupSnapshotRequest: _only_id,
    rpc.CloneGroupSnapshotRequest: _clone,
    rpc.ReadBlocksRequest: _read,
    rpc.ListAllocatedExtentsRequest: _allocated,
    rpc.ListChangedExtentsRequest: _changed,
}
