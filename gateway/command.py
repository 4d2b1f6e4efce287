"""The gateway's commands of the `frostgate` program, found there by entry point."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import typing
from pathlib import Path
from typing import Annotated

import typer

from gateway import logs, recovery, server
from gateway.config import Config, ConfigError, load
from gateway.groups import Core
from gateway.journal import Journal, JournalError
from gateway.pools import Pools
from providers.base import ProviderError

ConfigOption = Annotated[
    Path, typer.Option("--config", "-c", envvar="FROSTGATE_CONFIG", help="The gateway's TOML file.")
]

_DEFAULT_CONFIG = Path("/etc/frostgate/frostgate.toml")


def serve(
    config: ConfigOption = _DEFAULT_CONFIG,
    check: Annotated[bool, typer.Option("--check", help="Only check the configuration.")] = False,
) -> None:
    """Run the gateway in the foreground.

    Stops gracefully on SIGTERM and Ctrl-C: answers what was asked, finishes or suspends what goes on in the
    background. A second Ctrl-C does not wait. On start it resumes or undoes whatever an earlier one left.
    """
    loaded = _loaded(config)
    if check:
        typer.echo(f"{config}: ok, pools {', '.join(sorted(loaded.pools))}")
        return
    logs.configure(loaded.gateway.log_level)
    try:
        asyncio.run(server.run(loaded))
    except (JournalError, server.ListenError, OSError) as error:
        _refuse(str(error))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a thread that hangs in a dead storage must not keep the process


def reconcile(config: ConfigOption = _DEFAULT_CONFIG) -> None:
    """Rebuild the journal from what the storages say exists.

    The gateway must not be running. Restores what the journal does not have, marks FAILED what a storage has
    lost, removes what nobody confirmed. Prints JSON; safe to repeat.
    """
    loaded = _loaded(config)
    logs.configure(loaded.gateway.log_level)

    async def work() -> recovery.Reconciled:
        journal = Journal(loaded.gateway.journal)
        pools = Pools(loaded.pools, loaded.gateway.limits)
        try:
            return await recovery.reconcile(Core(journal, pools, loaded.gateway.limits))
        finally:
            journal.close()
            pools.close()

    try:
        outcome = asyncio.run(work())
    except (JournalError, ProviderError) as error:
        _refuse(str(error))
    typer.echo(json.dumps(vars(outcome), indent=2))


def _loaded(path: Path) -> Config:
    try:
        return load(path)
    except ConfigError as error:
        _refuse(str(error))


def _refuse(message: str) -> typing.NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)
