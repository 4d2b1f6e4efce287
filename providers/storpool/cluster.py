"""The calls to a cluster's API, by StorPool's own bindings, and the translation of its errors.

The bindings check every request and answer; their own repeating, which sleeps, is off. What the API calls transient is
repeated here, but for what runs inside a freeze window. An answer that did not come is Unanswered: the call may have
been done or not, and the caller looks.
"""

from __future__ import annotations

import http.client
import threading
from typing import Any

import tenacity
from storpool import spapi
from storpool.spcatch import InvalidArgumentError

from providers.base import InvalidName, PoolFull, PoolUnavailable, ProviderError
from providers.storpool.options import StorPoolOptions, connection

_FULL = "insufficientResources"
_REFUSED = (401, 403)


class Missing(PoolUnavailable):
    """The API knows no object of that name."""


class Exists(PoolUnavailable):
    """The API has an object of that name already."""


class Busy(PoolUnavailable):
    """The object is attached, open or needed by another."""


class Transient(PoolUnavailable):
    """The API asks to try again."""


class Unanswered(PoolUnavailable):
    """No answer came, or none that could be read: the call may have been done."""


class Cluster:
    """One cluster's API as one pool's options describe it. Thread-safe: every call has a connection of its own."""

    def __init__(self, pool: str, options: StorPoolOptions) -> None:
        """Take the Frostgate pool's name, for messages, and its options; nothing is asked yet."""
        self._pool = pool
        self._options = options
        self._lock = threading.Lock()
        self._apis: tuple[spapi.Api, spapi.Api] | None = None
        self._client_id: int | None = None

    @property
    def client_id(self) -> int | None:
        """Number of the StorPool client on this host, or None when nobody said. Raises PoolUnavailable."""
        self._connected()
        return self._client_id

    def call(self, method: str, *arguments: Any, raw: bool = False) -> Any:
        """Make one call by its name in the bindings, again while the API says that its failure is transient.

        `raw` gives the answer as it came, unchecked: for lists of a whole cluster, which the bindings take long to
        check. Raises Missing, Exists, Busy, Transient, Unanswered, PoolFull, InvalidName, PoolUnavailable.
        """
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Transient),
            wait=tenacity.wait_exponential(multiplier=0.1, max=2),
            stop=tenacity.stop_after_delay(self._options.retry_s),
            reraise=True,
        )
        return retrying(self._call, self._connected()[0], method, arguments, raw)

    def call_in_window(self, method: str, *arguments: Any, raw: bool = False) -> Any:
        """Make one call once, and wait for no longer than a freeze window allows. Raises what call() raises."""
        return self._call(self._connected()[1], method, arguments, raw)

    def _call(self, api: spapi.Api, method: str, arguments: tuple[Any, ...], raw: bool) -> Any:
        try:
            return getattr(api, method)(*arguments, returnRawAPIData=raw)
        except spapi.ApiError as error:
            raise self._translated(method, error) from error
        except InvalidArgumentError as error:
            raise InvalidName(f"StorPool cannot have that: {error}") from error
        except ConnectionRefusedError as error:
            raise PoolUnavailable(f"{self._where()} cannot be reached: {error}") from error
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            raise Unanswered(f"{self._where()} gave no answer to {method}: {error or type(error).__name__}") from error

    def _translated(self, method: str, error: spapi.ApiError) -> ProviderError:
        said = f"{self._where()}: {method}: {error.desc or error.name}"
        if error.transient:
            return Transient(f"{said} (transient)")
        if error.status in _REFUSED:
            with self._lock:  # the token may have been changed: look again the next time
                self._apis = None
            return PoolUnavailable(f"{said}: check the token (SP_AUTH_TOKEN, token_file)")
        if error.name == _FULL:
            return PoolFull(f"{said}; make room")
        if error.name == "invalidParam":
            return InvalidName(said)
        kinds = {"objectDoesNotExist": Missing, "objectExists": Exists, "busy": Busy}
        return kinds.get(error.name, PoolUnavailable)(said)

    def _connected(self) -> tuple[spapi.Api, spapi.Api]:
        with self._lock:
            if self._apis is None:
                found = connection(self._options)
                within = min(self._options.cut_timeout_s, self._options.timeout_s)
                ordinary, in_window = (
                    spapi.Api(
                        host=found.host,
                        port=found.port,
                        auth=found.token.get_secret_value(),
                        timeout=timeout_s,
                        transientRetries=0,
                        multiCluster=self._options.multi_cluster,
                    )
                    for timeout_s in (self._options.timeout_s, within)
                )
                self._apis, self._client_id = (ordinary, in_window), found.client_id
            return self._apis

    def _where(self) -> str:
        return f"pool {self._pool}: the StorPool API"
