"""Members as read-only NBD exports on a unix socket: what reads at random, and what QEMU and libnbd understand."""
