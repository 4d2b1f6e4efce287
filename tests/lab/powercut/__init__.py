"""A file system in memory, mounted by FUSE, that remembers what was done to it and what of that was synced.

From the record every state is made that a power cut can leave on a disk, and calls of the file system can be made to
fail or to hang. It stands in for device-mapper's log-writes, flakey and error targets, which not every kernel has.
"""
