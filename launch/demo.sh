#!/usr/bin/env bash
# Shows what preferred orientation does and what auxiliary particles cure, on data whose truth is known.
#
#   bash launch/demo.sh                        a made-up protein
#   bash launch/demo.sh MODEL.cif [SYMMETRY]   your own atomic model (PDB or mmCIF), e.g. C3
#
# Makes a virtual environment (.venv), simulates particles most of which are seen from the top, refines them on two MPI
# ranks plainly and then with auxiliary particles, and writes a report that compares both with the truth.
# Variables: RANKS (2), PARTICLES (2000), CRYOISO_VENV, PYTHON.
set -euo pipefail

case "${1:-}" in -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
model=
if [ -n "${1:-}" ]; then
  [ -f "$1" ] || { echo "$1: no such file (expected an atomic model, PDB or mmCIF)" >&2; exit 65; }
  model=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
fi
symmetry=${2:-}
ranks=${RANKS:-2} particles=${PARTICLES:-2000}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh

echo "Step 1 of 4: environment"
prepare_environment mpich
cryoiso=$venv/bin/cryoiso
export MPLBACKEND=Agg

box=64 pixel=3.0
if [ -z "$model" ]; then
  name=phantom symmetry=C3 truth=phantom reference=phantom-homologue
  what="a made-up C3 trimer, 135 Å long"
else
  name=$(basename "$model") && name=${name%%.*}
  symmetry=${symmetry:-C1} truth=demo/$name/truth.mrc reference=$model
  what=$(basename "$model")
  pixel=$("$venv/bin/python" - "$model" "$box" <<'PY'
import sys
import numpy as np
from cryoiso.io.models import positions, read_model
xyz, _ = positions(read_model(sys.argv[1]))
reach = np.linalg.norm(xyz - xyz.mean(0), axis=1).max()
print(max(3.0, round(2.6 * reach / float(sys.argv[2]), 1)))
PY
  )
fi
folder=demo/$name
rm -rf "$folder"
mkdir -p "$folder"

echo "Step 2 of 4: $particles particles of $what, $box px of $pixel Å, 97 % of the views from the top"
if [ -n "$model" ]; then
  "$cryoiso" reference "$model" "$truth" --box "$box" --pixel-size "$pixel" --symmetry "$symmetry" --lowpass 0
fi
"$cryoiso" simulate "$truth" "$folder" --n "$particles" --box "$box" --pixel-size "$pixel" --symmetry "$symmetry" \
  --mode preferred --fraction 0.97 --snr-db -21 --seed 1
"$cryoiso" reference "$reference" "$folder/reference.mrc" --box "$box" --pixel-size "$pixel" --symmetry "$symmetry" \
  --lowpass 0

echo "Step 3 of 4: the job file, $folder/job.toml"
cat > "$folder/job.toml" <<TOML
[particles]
file = "particles.star"

[reference]
file = "reference.mrc"

[sample]
symmetry = "$symmetry"

[truth]                      # only because these particles are simulated
particles = "truth.star"
map = "truth_map.mrc"

[run]
workflow = "auxiliary"
title = "Demo: $what, seen mostly from the top"
TOML
sed 's/^/    /' "$folder/job.toml"

echo "Step 4 of 4: mpirun -n $ranks cryoiso run $folder/job.toml --out $folder/run"
started=$SECONDS
"$venv/bin/mpirun" -n "$ranks" "$venv/bin/python" -m cryoiso.cli.main run "$folder/job.toml" --out "$folder/run"

"$venv/bin/python" - "$folder/run" $((SECONDS - started)) <<'PY'
import json
import sys
import textwrap
from pathlib import Path

run = Path(sys.argv[1])
summary = json.loads((run / "report.json").read_text())["summary"]
print(f"\nDone in {sys.argv[2]} s. What came out:\n")
print(textwrap.fill(" ".join(summary), 100, initial_indent="  ", subsequent_indent="  "))
print(f"""
Open the report:  {(run / "report.html").resolve()}

What to look at in it:
  - Maps: before and after the cure, what the same images give with their true poses, and the truth, on one grey scale.
  - Numbers: the column "before" is the plain refinement; "resolution along z" and "side views" are the disease.
  - Raw and auxiliary images side by side: can you tell which ones were made?
  - Half-map agreement beside Map against truth: the halves can agree on what is wrong, so their FSC does not tell.
  - Views and Pose errors, before and after: which views were taken for which.
The maps and poses themselves are in {run}/result.""")
PY
