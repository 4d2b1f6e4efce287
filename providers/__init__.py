"""Storage implementations behind the contract: one package per storage, base.py below them."""
