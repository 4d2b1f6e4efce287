"""Volumes that are files below one directory: an NFS mount or any local file system."""
