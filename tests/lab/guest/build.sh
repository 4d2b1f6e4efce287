#!/usr/bin/env bash
# Builds the lab guest, .lab/guest/{vmlinuz,initrd}: Debian's cloud kernel, busybox and qemu-ga
# in an initramfs of a few MB. The packages are downloaded and unpacked into .lab/cache; nothing
# is installed on this machine. Rebuilds only when this directory or a package version changed,
# needs no network otherwise, and keeps the image it has when a newer package cannot be fetched.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
lab=${FROSTGATE_LAB_BUILD:-$(cd "$here/../../.." && pwd)/.lab}
cache=$lab/cache guest=$lab/guest

# qemu-guest-agent's libraries, by the packages that hold them; e2fsprogs is for chattr
userland=(busybox-static qemu-guest-agent libc6 libglib2.0-0 libpcre2-8-0 libnuma1 libudev1
          liburing2 e2fsprogs libext2fs2 libcom-err2)
binaries=(usr/sbin/qemu-ga usr/bin/chattr)
# insmod order is worked out from these; xfs is loaded only when a disk holds one
boot_modules=(virtio_pci virtio_blk virtio_console ext4 evdev button)
xfs_modules=(xfs)

candidates() {  # package names -> name=version, as apt would fetch them now
  LC_ALL=C apt-cache policy "$@" 2>/dev/null |
    awk '/^[^ ]/ {sub(/:$/, ""); name=$0} /^  Candidate:/ && $2 != "(none)" {print name "=" $2}'
}

inputs=$(cd "$here" && sha256sum build.sh init fsfreeze-hook shutdown)
recorded=$(cat "$guest/built-from" 2>/dev/null || true)
complete() { [[ -s $guest/vmlinuz && -s $guest/initrd ]]; }

kernel_of() {  # the metapackage's one dependency is the real image
  LC_ALL=C apt-cache depends --no-recommends --no-suggests --important linux-image-cloud-amd64 2>/dev/null |
    awk '$1 == "Depends:" && /linux-image-/ {print $2; exit}'
}

kernel=$(kernel_of)
versions=$(candidates ${kernel:+"$kernel"} "${userland[@]}")
wanted="$inputs
$versions"
if complete && [[ $wanted == "$recorded" ]]; then exit 0; fi

fetch() {
  mkdir -p "$cache/packages"
  (cd "$cache/packages" && apt-get -q -o APT::Sandbox::User=root download "$@")
}
find_package() {  # newest downloaded file of a package
  ls -t "$cache/packages/$1"_*.deb 2>/dev/null | head -n 1
}

echo "lab: building the guest image in $guest"
known=$(wc -l <<<"$versions")
if [[ -z $kernel || $known -ne $((${#userland[@]} + 1)) ]]; then
  apt-get update -q || echo "lab: apt-get update failed in part; going on with what is known" >&2
  kernel=$(kernel_of)
  versions=$(candidates ${kernel:+"$kernel"} "${userland[@]}")
  wanted="$inputs
$versions"
fi
if ! fetch "$kernel" "${userland[@]}"; then
  # stale package lists are the usual reason
  apt-get update -q || true
  kernel=$(kernel_of)
  versions=$(candidates "$kernel" "${userland[@]}")
  wanted="$inputs
$versions"
  if ! fetch "$kernel" "${userland[@]}"; then
    if complete && [[ $(head -n "$(wc -l <<<"$inputs")" <<<"$recorded") == "$inputs" ]]; then
      echo "lab: newer packages cannot be fetched; keeping the image that is there" >&2
      exit 0
    fi
    echo "lab: cannot download the guest's packages" >&2
    exit 1
  fi
fi

work=$(mktemp -d "$cache/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/packages" "$work/root"
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
in_insmod_order() {
  modprobe --dirname "$unpacked" --set-version "$release" --ignore-install --show-depends --all "$@" |
    awk '$1 == "insmod" && !seen[$2]++ {print $2}'
}
pack_modules() {  # list-file modules...: copies them and lists their names in insmod order
  local list=$1 module name
  shift
  in_insmod_order "$@" | while read -r module; do
    name=$(basename "$module")
    case $name in
      *.ko) cp "$module" "$root/lib/modules/$name" ;;
      *.ko.xz) xz -dc "$module" > "$root/lib/modules/${name%.xz}" ;;
      *) echo "lab: do not know how to unpack $name" >&2; exit 1 ;;
    esac
    echo "/lib/modules/${name%.xz}"
  done > "$root/etc/$list"
}
[[ -d $module_tree ]]
pack_modules modules "${boot_modules[@]}"
pack_modules modules.xfs "${xfs_modules[@]}"

(cd "$root" && find . -mindepth 1 | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0) > "$work/initrd"
install -m 644 "$unpacked/boot/vmlinuz-$release" "$work/vmlinuz"

mkdir -p "$guest"
rm -f "$guest/built-from"
mv "$work/vmlinuz" "$work/initrd" "$guest/"
printf '%s\n' "$wanted" > "$guest/built-from"
# only what the image was built from stays in the cache
for file in "$cache"/packages/*.deb; do
  package=$(basename "${file%%_*}")
  [[ $file == "$(find_package "$package")" ]] || rm -f "$file"
done
echo "lab: guest image ready ($(du -h "$guest/vmlinuz" | cut -f1) kernel $release, $(du -h "$guest/initrd" | cut -f1) initrd)"
