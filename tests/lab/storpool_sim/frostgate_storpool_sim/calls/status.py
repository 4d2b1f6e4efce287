"""How the cluster is: services, clients and their configuration, peers, tasks; the other clusters it knows."""

from __future__ import annotations

from typing import Any

from frostgate_storpool_sim.catalog import SERVERS
from frostgate_storpool_sim.cluster import Cluster
from frostgate_storpool_sim.errors import invalid
from frostgate_storpool_sim.routes import Call

VERSION = "frostgate-storpool-sim"


def services(cluster: Cluster, call: Call) -> dict[str, Any]:
    """ServicesList and ServersList: all are running."""
    common = {"version": VERSION, "startTime": cluster.started, "status": "running"}
    clients = cluster.settings.clients if call.route.function != "serversList" else ()
    return {
        "clusterStatus": "running",
        "mgmt": {1: {**common, "id": 1, "nodeId": 1, "prio": 0, "active": True}},
        "clients": {client: {**common, "id": client, "nodeId": client % 64} for client in clients},
        "servers": {
            server: {**common, "id": server, "nodeId": server, "missingDisks": [], "pendingDisks": []}
            for server in SERVERS
        },
        "bridges": {},
        "iscsiTargets": {},
    }


def clients(cluster: Cluster, call: Call) -> list[dict[str, Any]]:
    """ClientsConfigDump and ClientConfigWait: every client has the present configuration."""
    wanted = call.arguments.get("clientId")
    if wanted is not None and wanted not in cluster.settings.clients:
        raise invalid("No such client registered")
    return [
        {
            "id": client,
            "generation": cluster.generation,
            "clientGeneration": cluster.generation,
            "configStatus": "ok",
            "delay": 0,
        }
        for client in cluster.settings.clients
        if wanted in (None, client)
    ]


def client_requests(cluster: Cluster, call: Call) -> dict[str, Any]:
    """ClientActiveRequests: none."""
    return {"clientId": call.arguments["clientId"], "requests": []}


def peers(cluster: Cluster, call: Call) -> dict[int, Any]:
    """NetworkPeersList: the servers."""
    up = {"beaconStatus": "NODE_UP", "clusterStatus": "CNODE_UP", "joined": True, "rdma": {}, "nonVoting": False}
    return {server: {**up, "networks": {0: {"mac": f"02:00:00:00:00:{server:02x}"}}} for server in SERVERS}


def tasks(cluster: Cluster, call: Call) -> list[Any]:
    """TasksList: none."""
    return []


def known_clusters(cluster: Cluster, call: Call) -> dict[str, Any]:
    """ClustersList: the others."""
    known = ((*found.partition("."), name) for name, found in cluster.settings.known)
    return {"clusters": [{"id": sub, "location": location, "name": name} for location, _, sub, name in known]}


def locations(cluster: Cluster, call: Call) -> dict[str, Any]:
    """LocationsList: those of the others."""
    found = {cluster_id.partition(".")[0] for _, cluster_id in cluster.settings.known}
    common = {"sendBufferSize": 0, "recvBufferSize": 0}
    return {"locations": [{"id": location, "name": location, **common} for location in sorted(found)]}


CALLS = {
    "clustersList": known_clusters,
    "locationsList": locations,
    "servicesList": services,
    "serversList": services,
    "serversListBlocked": services,
    "clientsConfigDump": clients,
    "clientConfigWait": clients,
    "clientActiveRequests": client_requests,
    "peersList": peers,
    "tasksList": tasks,
}
