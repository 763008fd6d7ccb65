#!/bin/sh
# One round of cisTEM's refine3d for one half-set, as the engine of cryoiso (docs/engine-by-command.md):
#
#   [refine]
#   engine = "command"
#
#   [command]
#   name = "cisTEM 2 refine3d"
#   run = "cistem.sh {stack} {cistem} {reference} {out_particles} {symmetry} {pixel_size} {radius} {resolution} {round} {half}"
#   out_half = ""      # cryoiso reconstructs the half-maps
#   rounds = 6
#
# The first round searches all views, later ones refine. MASS_KDA: molecular mass (500); THREADS: threads (4).
# The order of the answers is that of refine3d's questions in cisTEM's source of 2026 (commit 1a39ccbb); it was not run
# against cisTEM: if your version asks other questions, its log, command.log, shows where it parts.
set -eu
stack=$1 table=$2 reference=$3 out=$4 symmetry=$5 pixel=$6 radius=$7 resolution=$8 round=$9
if [ "$round" -eq 1 ]; then search=Yes; else search=No; fi
"${REFINE3D:-refine3d}" <<ANSWERS
$stack
$table
$reference
none.txt
No
projections.mrc
$out
changes.star
$symmetry
1
0
1.0
$pixel
${MASS_KDA:-500}
0.0
$radius
300.0
$resolution
0.0
0.0
$radius
$resolution
0.0
20
0.0
0.0
100.0
100.0
100.0
100.0
500.0
50.0
1.0
$search
Yes
Yes
Yes
Yes
Yes
Yes
No
No
No
Yes
Yes
No
Yes
No
${THREADS:-4}
ANSWERS
