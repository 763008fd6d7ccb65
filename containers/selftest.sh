#!/usr/bin/env bash
# Tries an image from inside: simulates particles of known truth, refines them on two ranks, looks at the result.
#   cryoiso-selftest [FOLDER]     FOLDER keeps what was made; default: a temporary one
set -euo pipefail

if [ $# -gt 0 ]; then
  mkdir -p "$1"
  folder=$1
else
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# two ranks also where there is one core, and as root, which Open MPI refuses unless told
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_mpi_yield_when_idle=1
[ "$(id -u)" != 0 ] || export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

cryoiso doctor "$folder"
cryoiso simulate phantom "$folder" --n 300 --box 32 --pixel-size 6 --snr-db -6 --seed 1 --overwrite
cat > "$folder/job.toml" <<'TOML'
[particles]
file = "particles.star"

[reference]
file = "truth_map.mrc"
lowpass_A = 40.0

[sample]
symmetry = "C3"

[truth]
particles = "truth.star"
map = "truth_map.mrc"

[refine]
max_iterations = 3
TOML
rm -rf "$folder/run"
mpirun -n 2 cryoiso run "$folder/job.toml" --out "$folder/run"

python - "$folder/run" <<'PY'
import json
import sys
from pathlib import Path

run = Path(sys.argv[1])
ranks = json.loads((run / "manifest.json").read_text())["starts"][-1]["ranks"]
numbers = json.loads((run / "report.json").read_text())["numbers"]
error = next(n["value"] for n in numbers if (n["group"], n["label"]) == ("Pose errors", "median"))
print(f"{ranks} ranks, poses wrong by {error:.1f}° (median)")
if ranks != 2 or error > 8:
    sys.exit("the self-test failed: expected 2 ranks and a median below 8°")
PY
