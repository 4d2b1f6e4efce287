#!/usr/bin/env bash
# Installs the Debian packages that the lab needs, then builds the guest image.
# Runs as root on a fresh Debian 12 (bash is all it needs); repeatable; does nothing in well
# under a second when everything is there. No service is enabled or started: the lab runs a
# private libvirtd of its own (tests/lab/hypervisor.py).
set -euo pipefail

packages=(
  # the project's interpreter and its system bindings (rados, rbd, libvirt are not on PyPI or need a compiler)
  python3 python3-venv python3-libvirt python3-libnbd ca-certificates git
  # the hypervisor: libvirtd and virsh, QEMU (TCG: KVM is not needed), qemu-img, qemu-nbd, qemu-io
  libvirt-daemon libvirt-clients qemu-system-x86 qemu-utils qemu-block-extra
  # a one-node Ceph, and the bindings that are not on PyPI
  ceph-mon ceph-osd ceph-mgr ceph-common python3-rados python3-rbd
  # file systems under and inside guests
  xfsprogs e2fsprogs mount util-linux
  # mounting snapshots; pyfuse3 is built from source
  fuse3 libfuse3-dev pkg-config gcc libc6-dev python3-dev libseccomp2
  # what the tests of mounting make images with
  ntfs-3g dosfstools mtools gdisk fdisk lvm2 cryptsetup-bin btrfs-progs exfatprogs
  # other people's NBD clients, for tests; what bench/ measures with and against
  libnbd-bin fio rbd-fuse
  # building the guest's kernel and initramfs out of downloaded packages
  cpio kmod xz-utils
)

missing=()
for package in "${packages[@]}"; do
  [[ $(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null) == installed ]] \
    || missing+=("$package")
done

if ((${#missing[@]})); then
  if ((EUID != 0)); then
    echo "lab: needs root to install: ${missing[*]}" >&2
    exit 1
  fi
  echo "lab: installing ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  # A third party's source that does not answer must not stop us; a missing package will, below.
  apt-get update -q || echo "lab: apt-get update failed in part; going on with what is known" >&2
  # Debian's maintainer scripts would start libvirtd and friends; policy-rc.d is theirs to ask,
  # RUNLEVEL=1 is enough for invoke-rc.d without systemd.
  RUNLEVEL=1 apt-get install -q -y --no-install-recommends "${missing[@]}"
fi

exec "$(dirname "$0")/guest/build.sh"
