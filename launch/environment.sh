# Sourced by demo.sh and test.sh: a virtual environment with cryoiso in it. Sets $venv.
#   prepare_environment EXTRAS     e.g. prepare_environment mpich,dev
# Variables: CRYOISO_VENV, where it lies (default: .venv here); PYTHON, which Python makes it.

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3 python3.12 python3.11 python3.13; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "No Python 3.11, 3.12 or 3.13 found. Install one, or name it: PYTHON=/path/to/python3.12 bash $0" >&2
  return 1
}

prepare_environment() {
  local extras=$1 python stamp wanted
  venv=${CRYOISO_VENV:-$PWD/.venv}
  stamp=$venv/.cryoiso-installed
  wanted="$(cksum pyproject.toml | cut -d' ' -f1-2) $PWD"
  if [ -f "$stamp" ] && grep -qxF "$wanted $extras" "$stamp" && "$venv/bin/python" -c 'import cryoiso' 2>/dev/null; then
    echo "  found in $venv"
    return
  fi
  if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
    python=$(find_python) || return 1
    if ! "$python" -m venv --clear "$venv"; then
      echo "Making a virtual environment failed. On Debian and Ubuntu: apt-get install python3-venv" >&2
      return 1
    fi
  fi
  echo "  installing cryoiso[$extras] into $venv (a few minutes the first time)"
  "$venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check --editable ".[$extras]" || return 1
  grep -qF "$wanted" "$stamp" 2>/dev/null || : > "$stamp"
  echo "$wanted $extras" >> "$stamp"
}

# Packages that tests compare with, each by itself: tests of one that cannot be had are skipped, and say so.
install_oracles() {
  "$venv/bin/python" - <<'PY'
import subprocess
import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    wanted = tomllib.load(file)["project"]["optional-dependencies"]["oracles"]
for one in wanted:
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--quiet", "--disable-pip-version-check", one]
    if subprocess.run(words).returncode:
        print(f"  {one.split(';')[0]} could not be installed; its tests will be skipped")
PY
}
