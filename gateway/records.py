"""What is kept with a snapshot on its storage, so that a lost journal can be rebuilt: JSON that people can read."""

from __future__ import annotations

import json

from google.protobuf import json_format

from frostgate.v1 import group_snapshot_pb2 as pb
from gateway.journal import Group

_VERSION = 1


def render(group: Group) -> bytes:
    """Return the record of a group snapshot as it is now."""
    snapshot = pb.GroupSnapshot()
    snapshot.CopyFrom(group.snapshot)
    for passing in ("progress", "revert", "failure"):
        snapshot.ClearField(passing)
    snapshot.state = pb.GROUP_SNAPSHOT_STATE_READY
    return json.dumps(
        {
            "version": _VERSION,
            "group_snapshot": json_format.MessageToDict(snapshot, preserving_proto_field_name=True),
            "spec": json_format.MessageToDict(group.spec, preserving_proto_field_name=True),
        },
        sort_keys=True,
    ).encode()


def parse(record: bytes) -> Group:
    """Return the group snapshot of a record.

    Raises ValueError when it is none, or of a newer version.
    """
    content = json.loads(record)
    if not isinstance(content, dict) or content.get("version") != _VERSION:
        raise ValueError("not a record of this version")
    try:
        snapshot = json_format.ParseDict(content["group_snapshot"], pb.GroupSnapshot())
        spec = json_format.ParseDict(content["spec"], pb.GroupSnapshotSpec())
    except (KeyError, json_format.ParseError) as error:
        raise ValueError(str(error)) from error
    return Group(snapshot, spec)
