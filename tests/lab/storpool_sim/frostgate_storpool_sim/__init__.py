"""A StorPool cluster in one process: its management API over HTTP, with real copy-on-write bytes behind it.

layers     the bytes: copy-on-write layers of 4 KiB chunks
catalog    what there is (volumes, snapshots, attachments ...), kept in SQLite
cluster    one cluster: the two together, behind two locks
devices    attached volumes as files of a FUSE file system, or as loop devices
routes     the calls, read from the StorPool bindings
calls/     what each call does
server     HTTP
faults     what is made to go wrong
command    `frostgate-storpool-sim`
"""
