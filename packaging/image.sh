#!/usr/bin/env bash
# Builds the image from packaging/Dockerfile and proves that the gateway in it serves.
# Without a registry for images the base is made by debootstrap, under the tag that the Dockerfile names.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(buildah debootstrap)
missing=()
for package in "${packages[@]}"; do
  [[ $(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
done
if ((${#missing[@]})); then
  echo "image: installing ${missing[*]}"
  apt-get update -q || true
  DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}"
fi

work=$(mktemp -d)
container=
cleanup() {
  [[ -z $container ]] || buildah "${storage[@]}" rm "$container" >/dev/null
  rm -rf "$work"
}
trap cleanup EXIT
mkdir -p .lab
storage=(--storage-driver vfs --root "$PWD/.lab/images" --runroot "$work/run")
base=docker.io/library/debian:bookworm-slim
image=frostgate:latest

if ! buildah "${storage[@]}" inspect --type image "$base" >/dev/null 2>&1; then
  echo "image: making the base, $base, with debootstrap"
  mirror=$(apt-get indextargets --format '$(SITE)' 'Codename: bookworm' 'Component: main' | head -n 1)
  debootstrap --variant=minbase bookworm "$work/base" "$mirror" >"$work/debootstrap.log" 2>&1 \
    || { tail -n 20 "$work/debootstrap.log" >&2; exit 1; }
  container=$(buildah "${storage[@]}" from scratch)
  buildah "${storage[@]}" add --quiet "$container" "$work/base" / >/dev/null
  buildah "${storage[@]}" commit --quiet "$container" "$base" >/dev/null
  buildah "${storage[@]}" rm "$container" >/dev/null
  container=
fi

echo "image: building $image"
version=$(.venv/bin/python -c 'import importlib.metadata; print(importlib.metadata.version("frostgate"))')
# the host's certificates serve hosts whose network has an authority of its own
buildah "${storage[@]}" build --quiet --isolation chroot --network host --volume /etc/ssl/certs:/run/host-certs:ro \
  --build-arg PIP_CERT=/run/host-certs/ca-certificates.crt --build-arg VERSION="$version" \
  --file packaging/Dockerfile --ignorefile packaging/dockerignore --tag "$image" . >/dev/null

echo "image: starting frostgate serve in it"
mkdir -p "$work/etc" "$work/pool" "$work/socket" "$work/journal"
cat >"$work/etc/frostgate.toml" <<'TOML'
[gateway]
listen = ["unix:/run/frostgate/frostgate.sock"]

[pools.local]
kind = "nfs"
root = "/srv/pool"
TOML
container=$(buildah "${storage[@]}" from "$image")
buildah "${storage[@]}" run --isolation chroot --network host \
  --volume "$work/etc:/etc/frostgate" --volume "$work/pool:/srv/pool" \
  --volume "$work/socket:/run/frostgate" --volume "$work/journal:/var/lib/frostgate" \
  "$container" -- frostgate serve 2>"$work/serve.log" &
serve=$!
for _ in $(seq 60); do
  if .venv/bin/python -m tests.health "unix:$work/socket/frostgate.sock" 2>/dev/null; then
    echo "image: $image answers SERVING; in it: $(buildah "${storage[@]}" run --isolation chroot "$container" -- frostgate --version)"
    pkill --full --exact 'frostgate serve|.*/frostgate serve' || true
    wait "$serve" || true
    exit 0
  fi
  kill -0 "$serve" 2>/dev/null || break
  sleep 0.5
done
cat "$work/serve.log" >&2
echo "image: the gateway in the image did not answer" >&2
exit 1
