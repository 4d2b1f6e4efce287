"""Clients of the contract: coordinator, command line."""
