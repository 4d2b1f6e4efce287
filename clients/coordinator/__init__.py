"""Snapshots of libvirt VMs: freezes the guest, has the gateway cut, thaws, and never leaves a guest frozen."""
