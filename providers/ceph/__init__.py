"""The ceph provider: RBD images of one pool and namespace, cut by RBD group snapshots."""
