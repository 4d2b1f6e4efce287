"""The lab: starts the real parts (libvirt, guests, file systems) and looks at them from outside."""
