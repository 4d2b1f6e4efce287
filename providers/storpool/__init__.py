"""The storpool provider: volumes of a StorPool cluster, through its HTTP API."""
