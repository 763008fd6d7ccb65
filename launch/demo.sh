#!/usr/bin/env bash
# Shows what preferred orientation does to a refinement, and what the default refinement does about it, on particles
# whose truth is known.
#
#   bash launch/demo.sh                        a made-up protein
#   bash launch/demo.sh MODEL.cif [SYMMETRY]   your own atomic model (PDB or mmCIF), e.g. C3
#
# Makes a virtual environment (.venv), simulates particles most of which are seen from the top, refines them on MPI ranks
# twice, as refinement programs usually do and with the defaults, and writes a report that compares both with the truth.
# Variables: RANKS (2), PARTICLES (1500), SEED (1), CRYOISO_VENV, PYTHON.
set -euo pipefail

case "${1:-}" in -h | --help) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
model=
if [ -n "${1:-}" ]; then
  [ -f "$1" ] || { echo "$1: no such file (expected an atomic model, PDB or mmCIF)" >&2; exit 65; }
  model=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
fi
symmetry=${2:-}
ranks=${RANKS:-2} particles=${PARTICLES:-1500} seed=${SEED:-1}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh

echo "Step 1 of 5: environment"
prepare_environment mpich
cryoiso=$venv/bin/cryoiso
export MPLBACKEND=Agg

box=48 pixel=4.0
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
print(max(4.0, round(2.6 * reach / float(sys.argv[2]), 1)))
PY
  )
fi
folder=demo/$name
rm -rf "$folder"
mkdir -p "$folder"

echo "Step 2 of 5: $particles particles of $what, $box px of $pixel Å, 98 % of the views from one end"
if [ -n "$model" ]; then
  "$cryoiso" reference "$model" "$truth" --box "$box" --pixel-size "$pixel" --symmetry "$symmetry" --lowpass 0
fi
"$cryoiso" simulate "$truth" "$folder" --n "$particles" --box "$box" --pixel-size "$pixel" --symmetry "$symmetry" \
  --mode preferred --fraction 0.98 --noise coloured --snr-db -15 --seed "$seed"
"$cryoiso" reference "$reference" "$folder/reference.mrc" --box "$box" --pixel-size "$pixel" --symmetry "$symmetry" \
  --lowpass 0

echo "Step 3 of 5: two job files, $folder/before.toml and $folder/job.toml"
job() { # TITLE: what both have in common
  cat <<TOML
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
title = "$1"
TOML
}
job "Demo: $what, seen mostly from one end" > "$folder/job.toml"
{
  job "the usual refinement"
  cat <<TOML

[refine]                     # as refinement programs usually do; the default treats uneven views
regularisation = "mean-weight"
weighted_fsc = false
view_density = false
TOML
} > "$folder/before.toml"
sed 's/^/    /' "$folder/before.toml"
echo "    (job.toml is the same without [refine]: all defaults)"

started=$SECONDS
echo "Step 4 of 5: mpirun -n $ranks cryoiso run $folder/before.toml --out $folder/before"
"$venv/bin/mpirun" -n "$ranks" "$venv/bin/python" -m cryoiso.cli.main run "$folder/before.toml" --out "$folder/before"
echo "Step 5 of 5: mpirun -n $ranks cryoiso run $folder/job.toml --out $folder/run"
"$venv/bin/mpirun" -n "$ranks" "$venv/bin/python" -m cryoiso.cli.main run "$folder/job.toml" --out "$folder/run"
"$cryoiso" report "$folder/run" --before "$folder/before" > /dev/null

"$venv/bin/python" - "$folder/run" $((SECONDS - started)) <<'PY'
import json
import sys
import textwrap
from pathlib import Path

run = Path(sys.argv[1])
sentences = json.loads((run / "report.json").read_text())["comparison"]["sentences"]
print(f"\nDone in {sys.argv[2]} s. What came out (before: the usual refinement; this run: the default one):\n")
for number, sentence in enumerate(sentences, 1):
    print(textwrap.fill(f"{number}. {sentence}", 100, initial_indent="  ", subsequent_indent="     "))
print(f"""
Open the report:  {(run / "report.html").resolve()}

What to look at in it:
  - Maps: the usual refinement, the default one, what the same images give with their true views, and the truth.
  - Numbers: the column "before" is the usual refinement.
  - Half-map agreement beside Map against truth: the halves can agree on what is wrong, so their FSC does not tell.
  - Views and Pose errors, before and after: which views were taken for which.
  - Learned density of views: what the default refinement found out about the particles' views by itself.
The maps and poses themselves are in {run}/result. This is one set of one seed; docs/benchmarks.md has the statistics.""")
PY
