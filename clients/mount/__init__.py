"""Snapshots as read-only directories (FUSE)."""
