"""The tags by which Frostgate knows its own objects in a cluster.

StorPool keeps short key-value pairs with every volume and snapshot: keys and values of at most 199 characters of
[A-Za-z0-9_.:-]. A group's id (128 of them at most) and a volume's name fit as they are; the two marks that a name can
begin with, "~" for a volume that has only its global id and "#", do not, and choose the key instead.

frostgate               id of the group snapshot: on everything that is Frostgate's
frostgate-pool          which pool of the cluster it is in (one group may have members in several)
frostgate-what          member, record
frostgate-cut           the reservation a member was cut for: a repeat finds its own, and nothing older; and a record's
frostgate-number        a member's place and how many there are: "0.8"
frostgate-volume        name of the volume (-id when it is a global id, -local when it begins with "#")
frostgate-of            global id of the volume
frostgate-state         of a record: new, settled
frostgate-cut-time      of a record: when the guest was frozen
frostgate-clone         on a volume that is a clone: which member it was made from
"""

from __future__ import annotations

import hashlib
from datetime import datetime

from providers.storpool.options import StorPoolOptions

GROUP = "frostgate"
POOL = "frostgate-pool"
WHAT = "frostgate-what"
CUT = "frostgate-cut"
NUMBER = "frostgate-number"
OF = "frostgate-of"
STATE = "frostgate-state"
CUT_TIME = "frostgate-cut-time"
CLONE = "frostgate-clone"

MEMBER = "member"
RECORD = "record"
NEW = "new"
SETTLED = "settled"

RESERVED_PREFIX = "frostgate."
"""Names of Frostgate's own volumes begin so."""

_MOST = 199
_VOLUME = {"": "frostgate-volume", "~": "frostgate-volume-id", "#": "frostgate-volume-local"}


def scope(options: StorPoolOptions) -> str:
    """Return the pool's own word for itself in a cluster: the same as long as it selects the same volumes."""
    if options.name_prefix is not None:
        return f"prefix:{options.name_prefix}"
    if options.tag is not None:
        return f"tag:{options.tag.replace('=', ':')}"
    word = f"template:{options.template}"
    return word if len(word) <= _MOST else f"template:{_digest(options.template)}"


def of_member(scope: str, group: str, cut: str, number: int, count: int, volume: str, global_id: str) -> dict[str, str]:
    """Return the tags of one member's snapshot."""
    mark = volume[0] if volume[0] in "~#" else ""
    return {
        GROUP: group,
        POOL: scope,
        WHAT: MEMBER,
        CUT: cut,
        NUMBER: f"{number}.{count}",
        _VOLUME[mark]: volume.removeprefix(mark),
        OF: global_id,
    }


def volume_in(tags: dict[str, str]) -> str:
    """Return the name of a member's volume, "" when the tags are not those of a member."""
    return next((mark + tags[key] for mark, key in _VOLUME.items() if key in tags), "")


def number_in(tags: dict[str, str]) -> tuple[int, int]:
    """Return a member's place and the number of members; (0, 0) when the tags are not those of a member."""
    number, _, count = tags.get(NUMBER, "").partition(".")
    return (int(number), int(count)) if number.isdecimal() and count.isdecimal() else (0, 0)


def of_record(scope: str, group: str, cut: str, cut_time: datetime, state: str) -> dict[str, str]:
    """Return the tags of the volume that has a group's record."""
    return {
        GROUP: group,
        POOL: scope,
        WHAT: RECORD,
        CUT: cut,
        STATE: state,
        CUT_TIME: cut_time.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
    }


def cut_time_in(tags: dict[str, str]) -> datetime | None:
    """Return the time of the cut, None when it is not there."""
    try:
        return datetime.fromisoformat(tags.get(CUT_TIME, ""))
    except ValueError:
        return None


def record_name(scope: str, group: str) -> str:
    """Return the name of the volume that has a group's record: one and the same whoever makes it."""
    return f"{RESERVED_PREFIX}{_digest(scope)[:8]}.{group}"


def clone_mark(scope: str, group: str, volume: str) -> str:
    """Return what a clone of a member is known by."""
    return _digest("\n".join((scope, group, volume)))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
