"""Who calls, and what they may do.

Over the unix socket the file's permissions are the check: who can open it may do everything. Over TCP a
client is known by its certificate (common name or DNS name) or by a token, and has the rights and pools that
the configuration gives it; nothing by default.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gateway.config import Client, Config, Right
from gateway.errors import Refused


@dataclass(frozen=True)
class Identity:
    """A known client. `pools` None means every pool; a `local` one has come by a unix socket."""

    name: str
    rights: frozenset[Right]
    pools: frozenset[str] | None = None
    local: bool = False

    def require(self, right: Right, pools: Iterable[str] = ()) -> None:
        """Raise Refused PERMISSION_DENIED unless the client may do that in all of these pools."""
        if right not in self.rights:
            raise Refused(
                "PERMISSION_DENIED", f"client {self.name} has no right to {right}", client=self.name, right=right
            )
        for pool in pools:
            if not self.sees(pool):
                raise Refused(
                    "PERMISSION_DENIED", f"client {self.name} has no right in pool {pool}", client=self.name, pool=pool
                )

    def sees(self, pool: str) -> bool:
        """Tell whether the client may know of a pool."""
        return self.pools is None or pool in self.pools


EVERYTHING: frozenset[Right] = frozenset({"read", "snapshot", "revert", "delete"})
LOCAL = Identity("local", EVERYTHING, local=True)
ANYBODY = Identity("anybody", EVERYTHING)


class Authenticator:
    """Tells who a call comes from."""

    def __init__(self, config: Config) -> None:
        """Take the configured clients."""
        self._insecure = config.gateway.insecure_tcp
        self._by_certificate = {c.certificate: c for c in config.clients if c.certificate}
        self._by_token = [c for c in config.clients if c.token_sha256]

    def identify(self, peer: str, certificate_names: Sequence[str], metadata: Mapping[str, str | bytes]) -> Identity:
        """Return the caller's identity or raise Refused UNAUTHENTICATED.

        Args: peer               gRPC's name of the peer, "unix:..." or "ipv4:..."
              certificate_names  common name and DNS names of the verified client certificate
              metadata           the call's metadata, keys in lower case
        """
        if peer.startswith("unix:"):
            return LOCAL
        for name in certificate_names:
            if client := self._by_certificate.get(name):
                return _identity(client)
        authorization = str(metadata.get("authorization", ""))
        if authorization.startswith("Bearer "):
            digest = hashlib.sha256(authorization.removeprefix("Bearer ").encode()).hexdigest()
            for client in self._by_token:
                if hmac.compare_digest(digest, client.token_sha256 or ""):
                    return _identity(client)
        if self._insecure:
            return ANYBODY
        raise Refused("UNAUTHENTICATED", "show a known client certificate or token (authorization: Bearer ...)")


def _identity(client: Client) -> Identity:
    return Identity(client.name, client.rights, client.pools)
