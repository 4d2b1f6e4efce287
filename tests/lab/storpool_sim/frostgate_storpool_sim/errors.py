"""Refusals, by the names that StorPool gives them.

Names that public programs of StorPool's know: objectDoesNotExist, objectExists, invalidParam, busy,
insufficientResources, runIfVersionIsMismatch. Clients go by the name: the HTTP status, 500, is what StorPool's tests
for OpenStack have.
"""

from __future__ import annotations


class Refused(Exception):
    """The API answers a call with an error."""

    def __init__(self, name: str, description: str, *, transient: bool = False, status: int = 500) -> None:
        """Take what the API says: a stable name, a text, and whether trying again can help."""
        super().__init__(f"{name}: {description}")
        self.name = name
        self.description = description
        self.transient = transient
        self.status = status

    def answer(self) -> dict[str, object]:
        """Return it as the API tells it."""
        return {"error": {"name": self.name, "descr": self.description, "transient": self.transient}}


def missing(kind: str, name: str) -> Refused:
    """Something that a call names is not there."""
    return Refused("objectDoesNotExist", f"{kind} '{name}' does not exist.")


def exists(kind: str, name: str) -> Refused:
    """Something by this name is there already."""
    return Refused("objectExists", f"{kind} '{name}' already exists.")


def invalid(description: str) -> Refused:
    """A parameter cannot be."""
    return Refused("invalidParam", description)


def busy(description: str) -> Refused:
    """Somebody has it."""
    return Refused("busy", description)


def no_room() -> Refused:
    """The cluster is full."""
    return Refused("insufficientResources", "Not enough free space in the cluster.")
