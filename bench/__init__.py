"""One script a claim; each prints ours and the peer's figure from the same run, and the ratio."""
