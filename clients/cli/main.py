"""The `frostgate` program: puts the commands together and ends with the documented exit codes."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points, version
from typing import Annotated

import structlog
import typer
from typer.exceptions import TyperException

from clients.cli.session import (
    INTERRUPTED,
    OK,
    AddressOption,
    CaOption,
    CertOption,
    KeyOption,
    OutputOption,
    TokenOption,
)

_HELP = """Consistent, storage-side snapshots of running KVM virtual machines.

Exit codes: 0 done, 1 another failure, 2 wrong usage, 3 no such thing, 4 refused by the state of things,
5 gateway or storage not available, 6 the guest could not be quiesced, 7 no right, 130 interrupted.
"""


def main() -> None:
    """Run the command line of this process."""
    arguments = sys.argv[1:]
    # what is logged must not get into what `cat` writes
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    if not _json_wanted(arguments):
        application(arguments)(prog_name="frostgate")
        return
    structlog.configure(processors=[structlog.processors.add_log_level, structlog.processors.JSONRenderer()])
    try:
        sys.exit(application(arguments)(prog_name="frostgate", standalone_mode=False) or OK)
    except TyperException as error:
        said, code = error.format_message(), error.exit_code  # wrong usage
    except typer.Abort:
        said, code = "interrupted", INTERRUPTED
    print(json.dumps({"error": said, "exit_code": code}), file=sys.stderr)
    sys.exit(code)


def application(arguments: Sequence[str]) -> typer.Typer:
    """Return the commands. Those that need libvirt or the server are loaded only when asked for."""
    app = typer.Typer(no_args_is_help=True, help=_HELP, pretty_exceptions_enable=False, add_completion=False)
    app.callback()(_options)
    from clients.cli import doctor, pools, snapshot

    asked = {argument for argument in arguments if not argument.startswith("-")}
    own = {"pools", "volumes", "snapshot", "doctor"}
    files = {"mount", "umount", "ls", "cat", "find", "diff", "restore"}
    every = not asked & (own | files | {"vm"} | set(entry_points(group="frostgate.commands").names))
    for entry in entry_points(group="frostgate.commands"):
        if every or entry.name in asked:
            app.command(entry.name)(entry.load())
    app.command()(pools.pools)
    app.command()(pools.volumes)
    app.add_typer(snapshot.app, name="snapshot")
    if every or "vm" in asked:
        from clients.cli import vm

        app.add_typer(vm.app, name="vm")
    if every or asked & files:
        from clients.cli import files as file_commands
        from clients.cli import finding, mount, restore

        app.command()(mount.mount)
        app.command()(mount.umount)
        app.command()(restore.restore)
        app.command()(file_commands.ls)
        app.command()(file_commands.cat)
        app.command()(finding.find)
        app.command()(finding.diff)
    app.command()(doctor.doctor)
    return app


def _json_wanted(arguments: Sequence[str]) -> bool:
    """Tell before they are parsed, as wrong ones are to be told in JSON as well."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    return any(
        one in ("--output=json", "-Ojson") or (one in ("--output", "-O") and following == "json")
        for one, following in pairs
    )


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"frostgate {version('frostgate')}")
        raise typer.Exit


def _options(
    address: AddressOption = None,
    output: OutputOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    key: KeyOption = None,
    token_file: TokenOption = None,
    show_version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Options that hold for every command."""


if __name__ == "__main__":
    main()
