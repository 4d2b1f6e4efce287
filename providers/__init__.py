"""Storage implementations behind the contract: one package per storage, each importing only base."""
