"""The gateway: hosts providers behind the contract."""
