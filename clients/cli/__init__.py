"""The `frostgate` command."""
