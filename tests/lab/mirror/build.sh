#!/usr/bin/env bash
# Builds the mirror guest (tests/lab/mirror_guest.py), .lab/mirror/{vmlinuz,initrd,overlay}: Debian's generic kernel, an
# initramfs that makes this machine's files the guest's root, and the NFS server's and client's programs, which lie over
# it. Packages are downloaded and unpacked; nothing is installed on this machine. Rebuilds only when something changed.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
. "$here/../guest/packages.sh"
mirror=$lab/mirror

# the cloud kernel, which the other guest has, knows no 9p
metapackage=linux-image-amd64
# the programs, and the libraries that this machine may lack; Kerberos' all together, as they must be of one version
tools=(nfs-kernel-server nfs-common netbase libnfsidmap1 libtirpc3 libtirpc-common libwrap0 libevent-core-2.1-7
       libsqlite3-0 libkeyutils1 libgssapi-krb5-2 libkrb5-3 libkrb5support0 libk5crypto3 libcom-err2)
modules=(virtio_pci virtio_blk virtio_console 9pnet_virtio 9p overlay crc32c_generic xfs ext4 loop fuse nfsd nfsv4)

inputs=$(cd "$here" && sha256sum build.sh init boot ../guest/packages.sh)
fetch_image "$mirror" "$inputs" "$metapackage" busybox-static "${tools[@]}"

work=$(mktemp -d "$cache/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
unpacked=$work/packages root=$work/root overlay=$work/image/overlay
mkdir -p "$unpacked" "$overlay" "$root"/{bin,etc,lib/modules,proc,sys,dev,host,over,rw,new}
for package in "$kernel" busybox-static; do dpkg-deb -x "$(find_package "$package")" "$unpacked"; done

for package in "${tools[@]}"; do
  dpkg-deb -x "$(find_package "$package")" "$work/tools"
done
# as on this machine, where /sbin is usr/sbin: a directory would hide the link
mkdir -p "$overlay/usr" "$overlay/var/lib"
for part in bin sbin lib; do
  for source in "$work/tools/usr/$part" "$work/tools/$part"; do
    [[ ! -d $source ]] || { mkdir -p "$overlay/usr/$part"; cp -a "$source/." "$overlay/usr/$part/"; }
  done
done
rm -rf "$overlay/usr/lib/systemd"
cp -a "$work/tools/var/lib/nfs" "$overlay/var/lib/nfs"
mkdir -p "$overlay/var/lib/nfs/nfsdcld" "$overlay/var/lib/nfs/rpc_pipefs" "$overlay/etc"
cp -a "$work/tools/etc/"{netconfig,protocols,services,rpc} "$overlay/etc/"
install -m 755 "$here/boot" "$overlay/usr/sbin/frostgate-mirror-boot"

install -m 755 "$unpacked/bin/busybox" "$root/bin/busybox"
ln -s busybox "$root/bin/sh"
install -m 755 "$here/init" "$root/init"
release=${kernel#linux-image-}
depmod -b "$unpacked" "$release"
pack_modules "$unpacked" "$release" "$root" modules "${modules[@]}"
pack_initrd "$root" "$work/initrd"
gzip -1 < "$work/initrd" > "$work/image/initrd"
install -m 644 "$unpacked/boot/vmlinuz-$release" "$work/image/vmlinuz"
finish_image "$mirror" "$work" "$wanted"
echo "lab: mirror guest ready ($(du -h "$mirror/vmlinuz" | cut -f1) kernel $release, $(du -h "$mirror/initrd" | cut -f1) initrd)"
