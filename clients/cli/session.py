"""What every command shares: where the gateway is, how to print, and which exit code tells what."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import grpc
import typer
from google.protobuf import json_format
from google.protobuf.message import Message

from clients.gateway import DEFAULT_ADDRESS, Endpoint, Gateway, GatewayError

F = TypeVar("F", bound=Callable[..., Any])

OK, FAILED, USAGE, NOT_FOUND, REFUSED, UNAVAILABLE, NOT_QUIET, NO_RIGHT, INTERRUPTED = 0, 1, 2, 3, 4, 5, 6, 7, 130

_CODES: dict[grpc.StatusCode, int] = {
    grpc.StatusCode.INVALID_ARGUMENT: USAGE,
    grpc.StatusCode.NOT_FOUND: NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS: REFUSED,
    grpc.StatusCode.FAILED_PRECONDITION: REFUSED,
    grpc.StatusCode.RESOURCE_EXHAUSTED: REFUSED,
    grpc.StatusCode.ABORTED: REFUSED,
    grpc.StatusCode.UNIMPLEMENTED: REFUSED,
    grpc.StatusCode.DATA_LOSS: REFUSED,
    grpc.StatusCode.UNAVAILABLE: UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: UNAVAILABLE,
    grpc.StatusCode.UNAUTHENTICATED: NO_RIGHT,
    grpc.StatusCode.PERMISSION_DENIED: NO_RIGHT,
}


class Output(StrEnum):
    """How results are printed."""

    TABLE = "table"
    JSON = "json"


@dataclass
class Session:
    """The options that hold for a whole invocation."""

    address: str = field(default_factory=lambda: os.environ.get("FROSTGATE_ADDRESS", DEFAULT_ADDRESS))
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    token_file: Path | None = None
    output: Output = Output.TABLE

    def gateway(self) -> Gateway:
        """Connect. Raises Refusal when a file cannot be read or the address is none."""
        if not self.address.startswith("unix:") and ":" not in self.address:
            raise Refusal(f"--address: {self.address!r} is neither unix:/path nor host:port", USAGE)
        token = os.environ.get("FROSTGATE_TOKEN")
        try:
            if self.token_file:
                token = self.token_file.read_text().strip()
            return Gateway(Endpoint(self.address, self.ca, self.cert, self.key, token))
        except OSError as error:
            raise Refusal(f"{error.filename}: {error.strerror}", USAGE) from None

    @property
    def json(self) -> bool:
        """Whether a program reads what we print."""
        return self.output is Output.JSON


class Refusal(Exception):
    """A command cannot go on; `exit_code` is one of the documented ones."""

    def __init__(self, message: str, exit_code: int = FAILED) -> None:
        """Take words that say what to do."""
        super().__init__(message)
        self.exit_code = exit_code


session = Session()
"""The one of this process; the options fill it."""


def _set(name: str) -> Callable[[Any], Any]:
    def callback(value: Any) -> Any:
        if value is not None:
            setattr(session, name, value)
        return value

    return callback


AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address", help="The gateway: unix:/path or host:port. [env: FROSTGATE_ADDRESS]", callback=_set("address")
    ),
]
OutputOption = Annotated[
    Output | None, typer.Option("--output", "-O", help="table, or json for scripts.", callback=_set("output"))
]
CaOption = Annotated[
    Path | None, typer.Option(envvar="FROSTGATE_CA", help="CA of the gateway's certificate (PEM).", callback=_set("ca"))
]
CertOption = Annotated[
    Path | None, typer.Option(envvar="FROSTGATE_CERT", help="Our certificate (PEM).", callback=_set("cert"))
]
KeyOption = Annotated[Path | None, typer.Option(envvar="FROSTGATE_KEY", help="Its key (PEM).", callback=_set("key"))]
TokenOption = Annotated[
    Path | None,
    typer.Option(help="File with our token; FROSTGATE_TOKEN has the token itself.", callback=_set("token_file")),
]


def exit_code(error: BaseException) -> int:
    """Return the documented exit code of an error."""
    if isinstance(error, GatewayError):
        return _CODES.get(error.status, FAILED)
    code = getattr(error, "exit_code", FAILED)
    return code if isinstance(code, int) else FAILED


def complain(error: BaseException) -> None:
    """Say on stderr what went wrong: words, or JSON with the reason and the names for --output json."""
    if session.json:
        content: dict[str, Any] = {"error": str(error), "exit_code": exit_code(error)}
        if isinstance(error, GatewayError):
            content |= {"reason": error.reason, "metadata": error.metadata}
        warn(content, "")
        return
    print(f"error: {printable(str(error))}", file=sys.stderr)
    if isinstance(error, GatewayError):
        for name, problem in error.violations[1:]:
            print(f"  also {printable(name)}: {printable(problem)}", file=sys.stderr)
        if error.reason not in ("", "INVALID_ARGUMENT", "GATEWAY_UNAVAILABLE"):
            request = error.metadata.get("request_id", "")
            print(f"  reason {error.reason}" + (f", request {request}" if request else ""), file=sys.stderr)


def warn(content: dict[str, Any], words: str) -> None:
    """Say something on stderr: words, or one line of JSON for --output json."""
    print(json.dumps(content) if session.json else words, file=sys.stderr)


def command(function: F) -> F:
    """Make a function a command: what it raises becomes words and the documented exit code, never a traceback."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (GatewayError, Refusal) as error:
            fail(error)
        except KeyboardInterrupt:
            if not session.json:
                print(file=sys.stderr)  # after the terminal's ^C
            warn({"error": "interrupted", "exit_code": INTERRUPTED}, "interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # whoever read our output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(OK) from None
        except Exception as error:
            if isinstance(getattr(error, "exit_code", None), int) and not isinstance(error, typer.Exit):
                fail(error)
            raise

    return wrapped  # type: ignore[return-value]


def fail(error: BaseException) -> NoReturn:
    """complain(), and end with the error's exit code."""
    complain(error)
    raise typer.Exit(exit_code(error))


def print_json(content: Message | list[Any] | dict[str, Any]) -> None:
    """Print one JSON document; messages with the contract's field names."""
    print(json.dumps(plain(content), indent=2))


def plain(content: Any) -> Any:
    """Return messages, also inside lists and dicts, as what json can print."""
    if isinstance(content, Message):
        return json_format.MessageToDict(content, preserving_proto_field_name=True)
    if isinstance(content, list):
        return [plain(item) for item in content]
    if isinstance(content, dict):
        return {key: plain(value) for key, value in content.items()}
    return content


def printable(text: str) -> str:
    """Return text in one line, with control characters as Python writes them, and bytes that are not UTF-8 as well.

    What others named must not steer the terminal, nor forge a line.
    """
    return text if text.isprintable() else "".join(map(_printable, text))


def _printable(character: str) -> str:
    if character.isprintable():
        return character
    number = ord(character)
    # os.fsdecode() makes such characters of bytes
    return f"\\x{number - 0xDC00:02x}" if 0xDC80 <= number <= 0xDCFF else ascii(character)[1:-1]


def confirm(question: str, *, yes: bool) -> None:
    """Ask before something that cannot be undone. Raises Refusal when nobody can answer, or the answer is no."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise Refusal(f"{question} Say --yes: there is no terminal to ask on", USAGE)
    if not typer.confirm(question, err=True):
        raise Refusal("not done", FAILED)
