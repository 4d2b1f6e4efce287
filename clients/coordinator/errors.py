"""Why a VM cannot be snapshotted or reverted. `exit_code` is that of the command line."""

from __future__ import annotations


class CoordinatorError(Exception):
    """The message says what to do."""

    exit_code = 1


class HypervisorUnavailable(CoordinatorError):
    """libvirt does not answer."""

    exit_code = 5


class DomainNotFound(CoordinatorError):
    """libvirt knows no such VM."""

    exit_code = 3


class DiskUnknown(CoordinatorError):
    """A disk lies in no pool of the gateway; it was not excluded by name."""

    exit_code = 3


class StateRefused(CoordinatorError):
    """The VM's state does not allow it: it runs, it has no disks, it is migrating."""

    exit_code = 4


class NotQuiet(CoordinatorError):
    """The guest could not be made quiet, or was not quiet any more when the cut was done. No snapshot was kept."""

    exit_code = 6


class StillFrozen(CoordinatorError):
    """The guest could not be thawed by us. The guard goes on trying."""

    exit_code = 6
