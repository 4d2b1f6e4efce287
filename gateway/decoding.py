"""Bytes on the wire that are no valid request become INVALID_ARGUMENT naming the field.

gRPC answers INTERNAL when a request cannot be parsed. Here the parser's failure is kept as a value, and the
field with the bad UTF-8 is found by parsing once more with every string declared as bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message

from gateway.errors import BadInput


class Malformed:
    """A request that could not be parsed; `error` is what to answer."""

    def __init__(self, error: BadInput) -> None:
        """Take the error."""
        self.error = error


def deserializer(message: type[Message]) -> Callable[[bytes], Message | Malformed]:
    """Return a deserializer that never raises."""

    def parse(data: bytes) -> Message | Malformed:
        try:
            return message.FromString(data)
        except DecodeError:
            return Malformed(BadInput(_violations(message.DESCRIPTOR, data)))

    return parse


def _violations(descriptor: Any, data: bytes) -> list[tuple[str, str]]:
    lenient = _lenient_class(descriptor.full_name, descriptor.file)
    try:
        message = lenient.FromString(data)
    except DecodeError:
        return [("request", "is not a protobuf message of this call")]
    return list(_undecodable(message, "")) or [("request", "is not a protobuf message of this call")]


def _undecodable(message: Message, prefix: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for field, value in message.ListFields():
        path = prefix + field.name
        for index, item in enumerate(value) if field.is_repeated else [(None, value)]:
            place = path if index is None else f"{path}[{index}]"
            if isinstance(item, Message):
                found += _undecodable(item, place + ".")
            elif isinstance(item, bytes) and not _is_utf8(item):
                found.append((place, "is not UTF-8"))
    return found


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


@cache
def _lenient_class(full_name: str, file: Any) -> Any:
    pool = descriptor_pool.DescriptorPool()
    _add(pool, file, set())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(full_name))


def _add(pool: descriptor_pool.DescriptorPool, file: Any, added: set[str]) -> None:
    if file.name in added:
        return
    added.add(file.name)
    for dependency in file.dependencies:
        _add(pool, dependency, added)
    declaration = descriptor_pb2.FileDescriptorProto()
    file.CopyToProto(declaration)
    for message in declaration.message_type:
        _strings_to_bytes(message)
    pool.Add(declaration)


def _strings_to_bytes(message: descriptor_pb2.DescriptorProto) -> None:
    message.options.map_entry = False  # a map's entries are a list on the wire, and can have any key here
    for field in message.field:
        if field.type == descriptor_pb2.FieldDescriptorProto.TYPE_STRING:
            field.type = descriptor_pb2.FieldDescriptorProto.TYPE_BYTES
    for nested in message.nested_type:
        _strings_to_bytes(nested)
