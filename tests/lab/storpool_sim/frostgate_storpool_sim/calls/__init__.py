"""What each call does: one function a call, found by the name that the bindings give it."""

from frostgate_storpool_sim.calls import (
    attaching,
    hardware,
    keyvalue,
    listing,
    revisions,
    snapshots,
    status,
    templates,
    volumes,
)

HANDLERS = {
    **volumes.CALLS,
    **revisions.CALLS,
    **snapshots.CALLS,
    **attaching.CALLS,
    **listing.CALLS,
    **templates.CALLS,
    **status.CALLS,
    **hardware.CALLS,
    **keyvalue.CALLS,
}
"""Every call that the simulator has, by the name of the bindings' function."""
