"""The key-value store: buckets of short texts, with a version each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from frostgate_storpool_sim.calls.answers import ok
from frostgate_storpool_sim.catalog import Bucket
from frostgate_storpool_sim.cluster import Cluster
from frostgate_storpool_sim.errors import Refused, exists, missing
from frostgate_storpool_sim.routes import Call

MAX_PAIRS = 4096
"""How many pairs a bucket may have. StorPool's own limit is not known publicly."""


def buckets(cluster: Cluster, call: Call) -> dict[str, Any]:
    """KV: names and versions."""
    return {"buckets": {bucket.name: bucket.version for bucket in cluster.table(Bucket).values()}}


def listed(cluster: Cluster, call: Call) -> dict[str, Any]:
    """KV/List: a whole bucket."""
    bucket = _bucket(cluster, call)
    return {"name": bucket.name, "version": bucket.version, "pairs": bucket.pairs}


def got(cluster: Cluster, call: Call) -> dict[str, Any]:
    """KV/Get: one pair."""
    bucket = _bucket(cluster, call)
    key = call.arguments["keyName"]
    if key not in bucket.pairs:
        raise missing("Key", key)
    return {"name": bucket.name, "version": bucket.version, "pairs": {key: bucket.pairs[key]}}


def create(cluster: Cluster, call: Call) -> dict[str, Any]:
    """KV/Create."""
    name = call.arguments["bucketName"]
    if name in cluster.table(Bucket):
        raise exists("Bucket", name)
    cluster.commit([Bucket(name)])
    return ok(cluster)


def delete(cluster: Cluster, call: Call) -> dict[str, Any]:
    """KV/Delete."""
    cluster.commit([], [_bucket(cluster, call)])
    return ok(cluster)


def update(cluster: Cluster, call: Call) -> dict[str, Any]:
    """KV/Set: pairs put in, those with an empty value taken out; only at a version, when one is named."""
    bucket = _bucket(cluster, call)
    if call.json.runIfVersionIs not in (None, bucket.version):
        raise Refused("runIfVersionIsMismatch", f"The version is {bucket.version}.")
    pairs = {key: value for key, value in {**bucket.pairs, **call.json.set}.items() if value}
    if len(pairs) > MAX_PAIRS:
        raise Refused("invalidParam", f"At most {MAX_PAIRS} pairs.")
    cluster.commit([replace(bucket, version=bucket.version + 1, pairs=pairs)])
    return ok(cluster)


def _bucket(cluster: Cluster, call: Call) -> Bucket:
    name = call.arguments["bucketName"]
    try:
        return cluster.table(Bucket)[name]
    except KeyError:
        raise missing("Bucket", name) from None


CALLS = {
    "kvsBuckets": buckets,
    "kvsList": listed,
    "kvsGet": got,
    "kvsCreate": create,
    "kvsDelete": delete,
    "kvsUpdate": update,
}
