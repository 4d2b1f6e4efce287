#!/usr/bin/env bash
# Builds the lab guest, .lab/guest/{vmlinuz,initrd}: Debian's cloud kernel, busybox and qemu-ga
# in an initramfs of a few MB. The packages are downloaded and unpacked into .lab/cache; nothing
# is installed on this machine. Rebuilds only when this directory or a package version changed,
# needs no network otherwise, and keeps the image it has when a newer package cannot be fetched.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
. "$here/packages.sh"
guest=$lab/guest

# qemu-guest-agent's libraries, by the packages that hold them; e2fsprogs is for chattr
userland=(busybox-static qemu-guest-agent libc6 libglib2.0-0 libpcre2-8-0 libnuma1 libudev1
          liburing2 e2fsprogs libext2fs2 libcom-err2)
binaries=(usr/sbin/qemu-ga usr/bin/chattr)
# insmod order is worked out from these; xfs is loaded only when a disk holds one
boot_modules=(virtio_pci virtio_blk virtio_console ext4 evdev button)
xfs_modules=(xfs)

inputs=$(cd "$here" && sha256sum build.sh packages.sh init fsfreeze-hook shutdown)
fetch_image "$guest" "$inputs" linux-image-cloud-amd64 "${userland[@]}"

work=$(mktemp -d "$cache/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/packages" "$work/root" "$work/image"
for package in "$kernel" "${userland[@]}"; do
  dpkg-deb -x "$(find_package "$package")" "$work/packages"
done
unpacked=$work/packages root=$work/root

# -- user land ---------------------------------------------------------------------------------
# dpkg-deb keeps /lib and /usr/lib apart as the packages ship them; the guest has one /lib
mkdir -p "$root"/{bin,sbin,etc,proc,sys,dev,run,tmp,mnt,lib64,lib/modules}
install -m 755 "$unpacked/bin/busybox" "$root/bin/busybox"
ln -s busybox "$root/bin/sh"
library_path=$unpacked/lib/x86_64-linux-gnu:$unpacked/usr/lib/x86_64-linux-gnu
loader=$unpacked/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2
for binary in "${binaries[@]}"; do
  install -m 755 "$unpacked/$binary" "$root/bin/"
  "$loader" --library-path "$library_path" --list "$unpacked/$binary" |
    awk '$2 == "=>" {print $3}' |
    while read -r library; do
      [[ $library == "$unpacked"/* ]] || { echo "lab: $binary needs $library: name its package" >&2; exit 1; }
      cp -L "$library" "$root/lib/"
    done
done
cp -L "$loader" "$root/lib64/"
install -m 755 "$here/init" "$root/init"
install -m 755 "$here/fsfreeze-hook" "$root/etc/fsfreeze-hook"
for verb in shutdown reboot poweroff halt; do install -m 755 "$here/shutdown" "$root/sbin/$verb"; done
echo 'root:x:0:0:root:/:/bin/sh' > "$root/etc/passwd"
echo 'root:x:0:' > "$root/etc/group"
mkdir -p "$root/etc/acpi/PWRF"
printf '#!/bin/sh\nexec /sbin/poweroff\n' > "$root/etc/acpi/PWRF/00000080"
chmod 755 "$root/etc/acpi/PWRF/00000080"

# -- kernel and modules ------------------------------------------------------------------------
release=${kernel#linux-image-}
module_tree=$unpacked/lib/modules/$release
depmod -b "$unpacked" "$release"
[[ -d $module_tree ]]
pack_modules "$unpacked" "$release" "$root" modules "${boot_modules[@]}"
pack_modules "$unpacked" "$release" "$root" modules.xfs "${xfs_modules[@]}"

pack_initrd "$root" "$work/image/initrd"
install -m 644 "$unpacked/boot/vmlinuz-$release" "$work/image/vmlinuz"
finish_image "$guest" "$work" "$wanted"
echo "lab: guest image ready ($(du -h "$guest/vmlinuz" | cut -f1) kernel $release, $(du -h "$guest/initrd" | cut -f1) initrd)"
