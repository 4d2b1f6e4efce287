# Sourced by the builders of the lab's guests: downloads Debian packages into .lab/cache, installs nothing on this
# machine, and packs a kernel's modules. Sets lab and cache.
lab=${FROSTGATE_LAB_BUILD:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)/.lab}
cache=$lab/cache

candidates() {  # package names -> name=version, as apt would fetch them now
  LC_ALL=C apt-cache policy "$@" 2>/dev/null |
    awk '/^[^ ]/ {sub(/:$/, ""); name=$0} /^  Candidate:/ && $2 != "(none)" {print name "=" $2}'
}

kernel_of() {  # the metapackage's one dependency is the real image
  LC_ALL=C apt-cache depends --no-recommends --no-suggests --important "$1" 2>/dev/null |
    awk '$1 == "Depends:" && /linux-image-/ {print $2; exit}'
}

fetch() {
  mkdir -p "$cache/packages"
  (cd "$cache/packages" && apt-get -q -o APT::Sandbox::User=root download "$@")
}

find_package() {  # newest downloaded file of a package
  ls -t "$cache/packages/$1"_*.deb 2>/dev/null | head -n 1
}

# fetch_image DIRECTORY INPUTS METAPACKAGE PACKAGES...: downloads what an image is built from, when it has to be built.
# Sets kernel (the real image's package) and wanted (what DIRECTORY/built-from has to say once it is built). Exits 0 when
# the image is as wanted, or when newer packages cannot be fetched and it was built from the same INPUTS.
fetch_image() {
  local directory=$1 inputs=$2 metapackage=$3 recorded
  shift 3
  recorded=$(cat "$directory/built-from" 2>/dev/null || true)
  complete() { [[ -s $directory/vmlinuz && -s $directory/initrd ]]; }
  look_up() {
    kernel=$(kernel_of "$metapackage")
    versions=$(candidates ${kernel:+"$kernel"} "$@")
    wanted="$inputs
$versions"
  }
  look_up "$@"
  if complete && [[ $wanted == "$recorded" ]]; then exit 0; fi
  echo "lab: building the guest image in $directory"
  if [[ -z $kernel || $(wc -l <<<"$versions") -ne $(($# + 1)) ]]; then
    apt-get update -q || echo "lab: apt-get update failed in part; going on with what is known" >&2
    look_up "$@"
  fi
  fetch "$kernel" "$@" && return
  # stale package lists are the usual reason
  apt-get update -q || true
  look_up "$@"
  fetch "$kernel" "$@" && return
  if complete && [[ $(head -n "$(wc -l <<<"$inputs")" <<<"$recorded") == "$inputs" ]]; then
    echo "lab: newer packages cannot be fetched; keeping the image that is there" >&2
    exit 0
  fi
  echo "lab: cannot download the guest's packages" >&2
  exit 1
}

in_insmod_order() {  # tree release modules...
  local tree=$1 release=$2
  shift 2
  modprobe --dirname "$tree" --set-version "$release" --ignore-install --show-depends --all "$@" |
    awk '$1 == "insmod" && !seen[$2]++ {print $2}'
}

pack_modules() {  # tree release root list-file modules...: copies them and lists their names in insmod order
  local tree=$1 release=$2 root=$3 list=$4 module name
  shift 4
  in_insmod_order "$tree" "$release" "$@" | while read -r module; do
    name=$(basename "$module")
    case $name in
      *.ko) cp "$module" "$root/lib/modules/$name" ;;
      *.ko.xz) xz -dc "$module" > "$root/lib/modules/${name%.xz}" ;;
      *) echo "lab: do not know how to unpack $name" >&2; exit 1 ;;
    esac
    echo "/lib/modules/${name%.xz}"
  done > "$root/etc/$list"
}

pack_initrd() {  # root file
  (cd "$1" && find . -mindepth 1 | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0) > "$2"
}

# finish_image DIRECTORY WORK WANTED: moves the finished parts into place, what they were built from last
finish_image() {
  local directory=$1 work=$2 part file package
  mkdir -p "$directory"
  rm -f "$directory/built-from"
  for part in "$work"/image/*; do
    rm -rf "${directory:?}/${part##*/}"
    mv "$part" "$directory/"
  done
  printf '%s\n' "$3" > "$directory/built-from"
  # only what an image was built from stays in the cache
  for file in "$cache"/packages/*.deb; do
    package=$(basename "${file%%_*}")
    [[ $file == "$(find_package "$package")" ]] || rm -f "$file"
  done
}
