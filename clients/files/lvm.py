"""LVM2: which logical volumes lie on some physical volumes, and where.

Runs in the confined process. libvslvm cannot open a volume group of more than one physical volume (up to its
20260901: "invalid physical volume value already set"), so the metadata, which is text, is read here.
Source: lvm2, lib/format_text/layout.h (label, PV header, metadata area) and lvm.conf(5)'s grammar.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clients.files.ranges import Bytes

_SECTOR_BYTES = 512
_LABEL_SECTORS = 4
_METADATA_MAGIC = b" LVM2 x[5A%r0N*>"
_MOST_METADATA_BYTES = 16 * 1024 * 1024
_TOKEN = re.compile(r'\s+|#[^\n]*|"((?:[^"\\]|\\.)*)"|(-?\d+(?:\.\d+)?)|([A-Za-z0-9_.+-]+)|([{}\[\]=,])')
_DEEPEST = 20

Section = dict[str, Any]


class Unreadable(Exception):
    """The metadata is damaged, or of a kind that we do not read; the text says which."""


@dataclass(frozen=True)
class PhysicalVolume:
    """A physical volume: its id and its volume group's metadata."""

    id: str
    source: Bytes
    group_name: str
    group: Section


@dataclass(frozen=True)
class LogicalVolume:
    """A logical volume; `why_not` says why it has no bytes."""

    name: str
    source: Bytes | None
    why_not: str = ""


def is_physical_volume(source: Bytes) -> bool:
    """Tell whether a label of LVM2 is there."""
    return _label(source) is not None


def open_physical_volume(source: Bytes) -> PhysicalVolume:
    """Read label and metadata. Raises Unreadable, OSError."""
    label = _label(source)
    if label is None:
        raise Unreadable("no label")
    sector, header = label
    at = struct.unpack_from("<I", header, 20)[0]
    identifier = header[at : at + 32].decode("ascii", "replace")
    at += 40
    data, at = _locations(header, at)
    areas, _ = _locations(header, at)
    if not data:
        raise Unreadable(f"no data area in the header at sector {sector}")
    newest: tuple[int, str, Section] | None = None
    for offset, size in areas:
        for text in _texts(source, offset, size):
            name, group = next(((k, v) for k, v in _parse(text).items() if isinstance(v, dict)), ("", {}))
            number = group.get("seqno", -1)
            if name and isinstance(number, int) and (newest is None or number > newest[0]):
                newest = number, name, group
    if newest is None:
        raise Unreadable("it belongs to no volume group, or keeps no copy of its metadata")
    return PhysicalVolume(identifier, source, newest[1], newest[2])


def missing(volumes: Sequence[PhysicalVolume]) -> int:
    """Return how many physical volumes of a group are not among these."""
    here = {volume.id for volume in volumes}
    return sum(_identifier(one) not in here for one in _sections(volumes[0].group, "physical_volumes").values())


def logical_volumes(volumes: Sequence[PhysicalVolume]) -> Iterator[LogicalVolume]:
    """Yield the visible logical volumes of one group, of which all physical volumes are given. Raises Unreadable."""
    group = max((volume.group for volume in volumes), key=lambda one: int(one.get("seqno", 0)))
    by_id = {volume.id: volume for volume in volumes}
    extent = _number(group, "extent_size") * _SECTOR_BYTES
    places = {}
    for name, one in _sections(group, "physical_volumes").items():
        volume = by_id.get(_identifier(one))
        if volume:
            places[name] = (volume.source, _number(one, "pe_start") * _SECTOR_BYTES)
    for name, one in _sections(group, "logical_volumes").items():
        if "VISIBLE" not in one.get("status", ()):
            continue
        try:
            yield LogicalVolume(name, _Striped(one, places, extent))
        except Unreadable as error:
            yield LogicalVolume(name, None, str(error))


@dataclass(frozen=True)
class _Segment:
    """A run of a logical volume over one or more stripes."""

    begin: int
    end: int
    stripe_bytes: int
    stripes: tuple[tuple[Bytes, int], ...]


class _Striped:
    """The bytes of a logical volume of linear and striped segments."""

    def __init__(self, volume: Section, places: Mapping[str, tuple[Bytes, int]], extent: int) -> None:
        self._segments = []
        for name, one in volume.items():
            if not (name.startswith("segment") and isinstance(one, dict)):
                continue
            if one.get("type") != "striped":
                raise Unreadable(f"it has a segment of type {one.get('type')!r}; linear and striped ones are read")
            begin = _number(one, "start_extent") * extent
            listed = one.get("stripes", [])
            stripes = []
            for where, first in zip(listed[::2], listed[1::2], strict=False):
                if where not in places or not isinstance(first, int):
                    raise Unreadable(f"physical volume {where} is not in this snapshot")
                source, start = places[where]
                stripes.append((source, start + first * extent))
            if not stripes:
                raise Unreadable("a segment has no stripes")
            size = one.get("stripe_size", 0) * _SECTOR_BYTES
            end = begin + _number(one, "extent_count") * extent
            if len(stripes) > 1 and size <= 0:
                raise Unreadable("a striped segment has no stripe size")
            self._segments.append(_Segment(begin, end, size if len(stripes) > 1 else end - begin, tuple(stripes)))
        self._segments.sort(key=lambda segment: segment.begin)
        self.size_bytes = max((segment.end for segment in self._segments), default=0)

    def pread(self, offset: int, length: int) -> bytes:
        """See ranges.Bytes."""
        end = min(offset + length, self.size_bytes)
        content = []
        while offset < end:
            segment = next((one for one in self._segments if one.begin <= offset < one.end), None)
            if segment is None:
                raise OSError("a logical volume has a gap")
            inner = offset - segment.begin
            row, within = divmod(inner, segment.stripe_bytes)
            turn, column = divmod(row, len(segment.stripes))
            source, start = segment.stripes[column]
            size = min(segment.stripe_bytes - within, segment.end - offset, end - offset)
            part = source.pread(start + turn * segment.stripe_bytes + within, size)
            if len(part) != size:
                raise OSError("a physical volume is shorter than its metadata says")
            content.append(part)
            offset += size
        return b"".join(content)


def _label(source: Bytes) -> tuple[int, bytes] | None:
    for sector in range(_LABEL_SECTORS):
        header = source.pread(sector * _SECTOR_BYTES, _SECTOR_BYTES)
        if len(header) == _SECTOR_BYTES and header[:8] == b"LABELONE" and header[24:32] == b"LVM2 001":
            return sector, header
    return None


def _locations(header: bytes, at: int) -> tuple[list[tuple[int, int]], int]:
    """Return the (offset, size) pairs from a position on, up to the pair of zeros, and what follows."""
    found = []
    while at + 16 <= len(header):
        offset, size = struct.unpack_from("<QQ", header, at)
        at += 16
        if not offset:
            break
        found.append((offset, size))
    return found, at


def _texts(source: Bytes, offset: int, size: int) -> Iterator[str]:
    """Yield the metadata of an area, which is a ring buffer after its header's sector."""
    header = source.pread(offset, _SECTOR_BYTES)
    if len(header) < _SECTOR_BYTES or header[4:20] != _METADATA_MAGIC:
        return
    begin, length = struct.unpack_from("<QQ", header, 40)
    if not begin or not 0 < length <= min(_MOST_METADATA_BYTES, size) or begin >= size:
        return
    first = min(length, size - begin)
    text = source.pread(offset + begin, first) + source.pread(offset + _SECTOR_BYTES, length - first)
    yield text.rstrip(b"\0\n").decode("utf-8", "replace")


def _parse(text: str) -> Section:
    """Return sections as dicts, arrays as lists, strings and numbers. Raises Unreadable."""
    tokens = _tokens(text)
    return _section(tokens, 0, inner=False)


def _tokens(text: str) -> Iterator[tuple[str, Any]]:
    at = 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise Unreadable(f"metadata cannot be read at byte {at}")
        at = found.end()
        if found[1] is not None:
            yield "value", found[1]
        elif found[2] is not None:
            yield "value", float(found[2]) if "." in found[2] else int(found[2])
        elif found[3] is not None:
            yield "name", found[3]
        elif found[4] is not None:
            yield found[4], found[4]


def _section(tokens: Iterator[tuple[str, Any]], depth: int, *, inner: bool) -> Section:
    if depth > _DEEPEST:
        raise Unreadable("metadata is nested too deeply")
    found: Section = {}
    for kind, name in tokens:
        if kind == "}" and inner:
            return found
        if kind not in ("name", "value"):
            raise Unreadable(f"metadata has {name!r} where a name should be")
        follows, _ = next(tokens, ("end", ""))
        if follows == "{":
            found[str(name)] = _section(tokens, depth + 1, inner=True)
        elif follows == "=":
            found[str(name)] = _value(tokens)
        else:
            raise Unreadable(f"metadata has neither a value nor a section for {name!r}")
    if inner:
        raise Unreadable("metadata ends within a section")
    return found


def _value(tokens: Iterator[tuple[str, Any]]) -> Any:
    kind, value = next(tokens, ("end", ""))
    if kind in ("value", "name"):
        return value
    if kind != "[":
        raise Unreadable(f"metadata has {value!r} where a value should be")
    listed: list[Any] = []
    for kind, value in tokens:
        if kind == "]":
            return listed
        if kind in ("value", "name"):
            listed.append(value)
        elif kind != ",":
            break
    raise Unreadable("metadata ends within a list")


def _sections(of: Section, name: str) -> dict[str, Section]:
    found = of.get(name, {})
    return {key: one for key, one in found.items() if isinstance(one, dict)} if isinstance(found, dict) else {}


def _identifier(of: Section) -> str:
    return str(of.get("id", "")).replace("-", "")


def _number(of: Section, name: str) -> int:
    value = of.get(name)
    if not isinstance(value, int) or value < 0:
        raise Unreadable(f"metadata has no {name}")
    return value
