"""Bringing files back out of snapshots."""
