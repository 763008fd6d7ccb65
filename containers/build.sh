#!/usr/bin/env bash
# Builds the container image and tries it: a small job of known truth on two ranks.
#
#   bash containers/build.sh [OPTIONS] [-- OPTIONS OF THE BUILDER]
#
#   --builder NAME       apptainer, singularity, docker or podman (default: the first of these that there is)
#   --bootstrap KIND     apptainer: docker (default), debootstrap or localimage
#   --base IMAGE         base image; for localimage an image file or the folder of a root file system
#   --mirror URL         Debian mirror for debootstrap
#   --cpu                torch for CPUs only (the image is a tenth as large)
#   --torch REQUIREMENT  e.g. torch==2.6.0, for an older driver
#   --torch-index URL    index that torch comes from, e.g. https://download.pytorch.org/whl/cu126
#   --rocm               for AMD GPUs: containers/rocm.def
#   --no-relion          leave RELION out
#   --no-test            only build
#   --out NAME           file (default: cryoiso.sif) or, for docker and podman, name of the image (default: cryoiso)
#   --force              replace the file
#
# What a site needs to reach its mirrors (proxies, certificates, pip.conf) goes behind "--" and into the builder's own
# variables; docs/container.md has an example.
set -euo pipefail

die() { echo "error: $1" >&2; exit "${2:-2}"; }
value() { [ $# -gt 1 ] && [ -n "$2" ] || die "$1 wants a value; --help lists the options"; }

builder='' bootstrap='' base='' mirror='' torch='' torch_index='' relion='' rocm='' out='' try=yes more=()
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) sed -n '2,21s/^# \{0,1\}//p' "$0"; exit 0 ;;
    --builder) value "$@"; builder=$2; shift ;;
    --bootstrap) value "$@"; bootstrap=$2; shift ;;
    --base) value "$@"; base=$2; shift ;;
    --mirror) value "$@"; mirror=$2; shift ;;
    --cpu) torch_index=https://download.pytorch.org/whl/cpu ;;
    --torch) value "$@"; torch=$2; shift ;;
    --torch-index) value "$@"; torch_index=$2; shift ;;
    --rocm) rocm=yes ;;
    --no-relion) relion=no ;;
    --no-test) try=no ;;
    --out) value "$@"; out=$2; shift ;;
    --force) more+=(--force) ;;
    --) shift; more+=("$@"); break ;;
    *) die "unknown option $1; --help lists the options" ;;
  esac
  shift
done

find_builder() {
  local name
  for name in apptainer singularity docker podman; do
    if command -v "$name" > /dev/null; then
      echo "$name"
      return
    fi
  done
  die "none of apptainer, singularity, docker and podman is on the PATH. Apptainer needs no daemon and no root: https://apptainer.org" 69
}

[ -n "$builder" ] || builder=$(find_builder)
case "$builder" in apptainer | singularity | docker | podman) ;; *) die "unknown builder $builder" ;; esac
command -v "$builder" > /dev/null || die "$builder is not on the PATH" 69
case "$bootstrap" in '' | docker | debootstrap | localimage) ;; *) die "unknown bootstrap $bootstrap" ;; esac
[ "$bootstrap" != localimage ] || [ -e "$base" ] || die "--bootstrap localimage wants --base FILE_OR_FOLDER that exists"
[ "$bootstrap" != debootstrap ] || command -v debootstrap > /dev/null ||
  die "debootstrap is not on the PATH: apt-get install debootstrap" 69
[ "$bootstrap" != debootstrap ] || [ "$(id -u)" = 0 ] || die "debootstrap needs root; --bootstrap docker does not"
if [ -n "$rocm" ] && { [ -n "$torch$torch_index$mirror" ] || [ "$bootstrap" = debootstrap ]; }; then
  die "--rocm takes torch from its base image: no --cpu, --torch, --torch-index, --mirror, debootstrap"
fi

# relative names mean the folder that this was called from
[ -z "$base" ] || [ ! -e "$base" ] || base=$(realpath "$base")
case "$builder" in
  apptainer | singularity) out=$(realpath -m "${out:-cryoiso.sif}") ;;
  *) out=${out:-cryoiso} ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."

arguments=()
argument() { [ -z "$2" ] || arguments+=(--build-arg "$1=$2"); }
argument FROM "$base"
argument RELION "$relion"
argument TORCH "$torch"
argument TORCH_INDEX "$torch_index"

build_sif() {
  [ ! -e "$out" ] || [[ " ${more[*]} " == *" --force "* ]] || die "$out exists; --force replaces it"
  argument BOOTSTRAP "$bootstrap"
  argument MIRROR "$mirror"
  local definition=apptainer.def
  [ -z "$rocm" ] || definition=containers/rocm.def
  # %test would run here; afterwards it runs as every user runs the image, read-only
  "$builder" build --notest "${arguments[@]}" "${more[@]}" "$out" "$definition"
  [ "$try" = no ] || "$builder" test "$out"
  echo "built $out, $(du -h "$out" | cut -f1)"
}

build_oci() {
  [ -z "$bootstrap" ] || die "--bootstrap is for apptainer; $builder takes --base IMAGE"
  if [ -n "$rocm" ]; then
    argument TORCH present
    [ -n "$base" ] || argument FROM "$(sed -n 's/^ *FROM=//p' containers/rocm.def)"
  fi
  argument VERSION "$(sed -n 's/^__version__ = "\(.*\)"/\1/p' cryoiso/__init__.py)"
  "$builder" build "${arguments[@]}" "${more[@]}" --tag "$out" --file containers/Dockerfile .
  [ "$try" = no ] || "$builder" run --rm --entrypoint cryoiso-selftest "$out"
  echo "built $out"
}

case "$builder" in apptainer | singularity) build_sif ;; *) build_oci ;; esac
