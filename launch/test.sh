#!/usr/bin/env bash
# Sets up .venv and runs all checks: ruff (lint and format), mypy, import-linter, the documentation's links, pytest.
#
#   bash launch/test.sh                       everything but the slow tests
#   bash launch/test.sh --slow                those too
#   bash launch/test.sh tests/cli/test_cli.py -x  arguments go to pytest
#
# Variables: CRYOISO_VENV, PYTHON; CRYOISO_SHARED, folder of reference data (default: ../shared);
# CRYOISO_TEST_WORKERS, test files that run at the same time (default: one a core);
# CRYOISO_TEST_ORACLES=1, also install the packages of others that some tests compare with.
set -uo pipefail
case "${1:-}" in -h | --help) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh

echo "environment"
prepare_environment mpich,docs,dev || exit 1
[ -z "${CRYOISO_TEST_ORACLES:-}" ] || install_oracles
unset PYTHONDONTWRITEBYTECODE # else every process that a test starts compiles all of cryoiso again
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} NUMBA_NUM_THREADS=${NUMBA_NUM_THREADS:-1} MPLBACKEND=Agg

failed=
check() {
  echo
  echo "== $*"
  "$venv/bin/$1" "${@:2}" || failed="$failed $1"
}
check ruff check .
check ruff format --check .
check mypy
check lint-imports
check sphinx-build -W --keep-going -q -b html docs docs/_build
workers=${CRYOISO_TEST_WORKERS:-$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)}
check python -m pytest -n "$workers" --dist loadfile "$@"

echo
if [ -n "$failed" ]; then
  echo "FAILED:$failed"
  exit 1
fi
echo "all checks passed"
