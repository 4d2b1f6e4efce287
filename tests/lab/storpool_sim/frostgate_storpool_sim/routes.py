"""The API's calls, read from the StorPool bindings: method, path, arguments, the types of request and answer.

Nothing of it is copied: storpool.spapi compiles a function for every call, which carries its documentation (method and
path) and, among its globals, the validators of its arguments, of its JSON and of its answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from storpool import spapi, spcatch, spjson

from frostgate_storpool_sim.errors import Refused, invalid

_ARGUMENT = re.compile(r"\{(\w+)\}")
_ANY_NAME = "([^/]+)"


@dataclass(frozen=True)
class Route:
    """One call. `query` is what errors, faults and counts name it by: its path without the arguments."""

    function: str
    method: str
    query: str
    pattern: re.Pattern[str]
    multi_cluster: bool
    arguments: tuple[tuple[str, Callable[[Any], Any]], ...]
    request: Callable[[Any], Any] | None
    answer: Callable[[Any], Any]


@dataclass(frozen=True)
class Call:
    """A request that the bindings find valid. `cluster` is the one that RemoteCommand names, or ""."""

    route: Route
    arguments: dict[str, Any]
    json: Any
    cluster: str = ""
    multi_cluster: bool = False


def read() -> list[Route]:
    """Return every call of the bindings."""
    found = []
    for function, compiled in vars(spapi.Api).items():
        documented = getattr(compiled, "spDoc", None)
        if documented is None or not callable(compiled) or not hasattr(documented, "path"):
            continue
        path = documented.path.removeprefix(f"{spapi.SP_API_PREFIX}/")
        query = path.removeprefix("MultiCluster/")
        names = _ARGUMENT.findall(query)
        validators = compiled.__globals__
        found.append(
            Route(
                function=function,
                method=documented.method,
                query=query.partition("/{")[0],
                pattern=re.compile(_ARGUMENT.sub(_ANY_NAME, query)),
                multi_cluster=query != path,
                arguments=tuple((name, validators[f"_validate_{name}"]) for name in names),
                request=validators.get("_validate_json"),
                answer=validators["returns"],
            )
        )
    return found


class Router:
    """Finds the call that a request makes."""

    def __init__(self) -> None:
        """Read the bindings."""
        self.routes = read()

    def resolve(self, method: str, path: str) -> tuple[Route, dict[str, str], str, bool]:
        """Return a path's call, its arguments, RemoteCommand's cluster or "", and whether it is MultiCluster's.

        Raises Refused.
        """
        query = path.removeprefix(f"{spapi.SP_API_PREFIX}/")
        if query == path:
            raise Refused("notFound", f"{path} is not below {spapi.SP_API_PREFIX}/", status=404)
        cluster = ""
        if query.startswith("RemoteCommand/"):
            _, cluster, query = [*query.split("/", 2), "", ""][:3]
        multi_cluster = query.startswith("MultiCluster/")
        query = query.removeprefix("MultiCluster/")
        for route in self.routes:
            match = route.pattern.fullmatch(query)
            if match and route.method == method and (route.multi_cluster or not multi_cluster):
                names = [name for name, _ in route.arguments]
                given = dict(zip(names, map(unquote, match.groups()), strict=True))
                return route, given, unquote(cluster), multi_cluster
        raise Refused("notFound", f"The bindings have no call {method} {path}", status=404)


def checked(route: Route, given: dict[str, str], body: Any, cluster: str, multi_cluster: bool) -> Call:
    """Return the call with its arguments and JSON as the bindings' types. Raises Refused(invalidParam)."""
    arguments = {name: validated(check, given[name]) for name, check in route.arguments}
    if route.request is None:
        return Call(route, arguments, None, cluster, multi_cluster)
    return Call(route, arguments, validated(route.request, _named(body)), cluster, multi_cluster)


def validated(check: Callable[[Any], Any], value: Any) -> Any:
    """Return a value as the bindings' type. Raises Refused(invalidParam)."""
    try:
        return check(value)
    except (spcatch.InvalidArgumentError, TypeError, ValueError, AttributeError, LookupError) as error:
        raise invalid(str(error)) from error


def encoded(route: Route, data: Any) -> bytes:
    """Return an answer's JSON, after the bindings have found it valid: spcatch.InvalidArgumentError is a bug here."""
    text: str = spjson.dumps(spapi.clear_none(data))
    route.answer(spjson.loads(text))
    return text.encode()


def _named(body: Any) -> Any:
    """Without names that are "": StorPool's own CloudStack plug-in says so that it wants none."""
    if isinstance(body, list):
        return [_named(part) for part in body]
    if isinstance(body, dict):
        return {key: _named(part) for key, part in body.items() if not (key == "name" and part == "")}
    return body
