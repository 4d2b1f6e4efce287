"""The files inside snapshots: read by file-system libraries in a confined process, without mounting anything."""
