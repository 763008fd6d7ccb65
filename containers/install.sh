#!/usr/bin/env bash
# Puts cryoiso into a container image: the common part of apptainer.def, containers/rocm.def and containers/Dockerfile.
# Runs inside the image as root, on Debian 12 or Ubuntu 24.04. Variables:
#
#   TORCH         requirement of torch, e.g. torch==2.6.0; "present": the one that the base image's Python has;
#                 "default": what pyproject.toml asks for
#   TORCH_INDEX   index that torch comes from; "default": pip's own settings
#   RELION        yes or no: Debian's RELION
#   PYTHON        which Python makes the environment (default: python3)
#
# What pip and apt need to reach their servers (mirrors, proxies, certificates) comes from outside, by their own
# variables and files.
set -euo pipefail

torch=${TORCH:-default} torch_index=${TORCH_INDEX:-default} relion=${RELION:-yes}
source=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
prefix=/opt/cryoiso
share=$prefix/share/cryoiso
export DEBIAN_FRONTEND=noninteractive PIP_ROOT_USER_ACTION=ignore

packages() {
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "$@" > /dev/null
  rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin
  apt-get clean
}

pip() {
  "$prefix/bin/python" -m pip --no-cache-dir --disable-pip-version-check --quiet "$@"
}

system() {
  local wanted=(ca-certificates openmpi-bin)
  [ -n "${PYTHON:-}" ] || wanted+=(python3 python3-venv)
  [ "$relion" = no ] || wanted+=(relion)
  echo "packages: ${wanted[*]}"
  packages "${wanted[@]}"
}

environment() {
  local python=${PYTHON:-python3}
  "$python" -m venv "$prefix"
  if [ "$torch" = present ]; then
    # by its folder, because a virtual environment of a virtual environment does not see the packages of that
    "$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent.parent)' \
      > "$("$prefix/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
  elif [ "$torch$torch_index" != defaultdefault ]; then
    [ "$torch" != default ] || torch=$(requirement torch)
    local where=()
    [ "$torch_index" = default ] || where=(--index-url "$torch_index")
    echo "torch: $torch ${where[*]}"
    pip install "${where[@]}" "$torch"
  fi
  echo "cryoiso and what it needs"
  pip install "$source"
}

requirement() {  # NAME: as pyproject.toml has it
  "$prefix/bin/python" - "$source/pyproject.toml" "$1" <<'PY'
import re, sys, tomllib
with open(sys.argv[1], "rb") as file:
    wanted = tomllib.load(file)["project"]["dependencies"]
print(next(line for line in wanted if re.match(r"[\w.-]+", line)[0] == sys.argv[2]))
PY
}

compiler() {  # torch.compile makes its GPU kernels with a C compiler and Python's headers
  "$prefix/bin/python" -c 'import sys, torch; sys.exit(not (torch.version.cuda or torch.version.hip))' || return 0
  echo "torch for GPUs: a C compiler as well"
  packages gcc libc6-dev python3-dev
}

settings() {
  mkdir -p "$share"
  "$prefix/bin/python" -c 'import cryoiso; print(cryoiso.__version__)' > "$share/version"
  install -m 755 "$source/containers/selftest.sh" "$prefix/bin/cryoiso-selftest"
  cat > "$share/environment.sh" <<'SH'
# Sourced whenever something starts in the image.
export PATH=/opt/cryoiso/bin:$PATH
export LC_ALL=C.UTF-8
# Python packages of the host and of the user's home do not belong into the image.
unset PYTHONPATH PYTHONHOME
export PYTHONNOUSERSITE=1
# The image's own MPI. mpirun of the host may name its own folders, where the image's would look for its parts.
if [ -z "${MPI4PY_LIBMPI:-}" ]; then
  export MPI4PY_LIBMPI=libmpi.so.40
  unset OPAL_PREFIX PMIX_PREFIX
fi
# Each unprivileged container is a user namespace of its own, and ranks in different ones may not read each other's
# memory. Open MPI 4.1 notices it, and hangs at the first large message all the same; MPICH stops.
if [ -r /proc/self/uid_map ] && read -r _ _ count < /proc/self/uid_map && [ "$count" != 4294967295 ]; then
  export OMPI_MCA_btl_vader_single_copy_mechanism=${OMPI_MCA_btl_vader_single_copy_mechanism:-none}
  export MPIR_CVAR_CH4_CMA_ENABLE=${MPIR_CVAR_CH4_CMA_ENABLE:-0}
fi
unset count
SH
}

# Compiled CPU kernels: an image cannot be written to later, so they are copied into a folder of the user at the first
# start (cryoiso/core/kernelcache.py); a CPU of another kind compiles its own there.
kernels() {
  echo "a small job, which also compiles the CPU kernels"
  # shellcheck source=/dev/null
  (. "$share/environment.sh" && NUMBA_CACHE_DIR=$share/kernels cryoiso-selftest > /tmp/selftest.log 2>&1) ||
    { cat /tmp/selftest.log; return 1; }
  rm -f /tmp/selftest.log
  chmod -R a+rX "$share"
}

system
environment
compiler
settings
cd /
rm -rf /opt/cryoiso-source
kernels
