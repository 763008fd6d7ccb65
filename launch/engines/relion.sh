#!/bin/sh
# RELION 4.0.2 or later with a reference for each half-set, as the engine of cryoiso (docs/engine-by-command.md):
#
#   [refine]
#   engine = "command"
#
#   [command]
#   name = "RELION 5.0.1"
#   run = "relion.sh {particles} {reference1} {reference2} {symmetry} {diameter} {resolution} {seed}"
#   out_particles = "run_data.star"
#   out_half = "run_half{half}_class001_unfil.mrc"   # in a co-refinement: "", and cryoiso reconstructs them
#
# Of references with half1 and half2 in their names RELION gives each half-set its own; earlier versions would give both
# the same. RELION: program (relion_refine_mpi); MPIRUN: launcher (mpirun -n 3); MORE: further options (--gpu, --j 4).
set -eu
particles=$1 reference1=$2 reference2=$3 symmetry=$4 diameter=$5 resolution=$6 seed=$7
program=${RELION:-relion_refine_mpi}
version=$("$program" --version 2>&1 | sed -n 's/.*RELION version: *\([0-9.]*\).*/\1/p' | head -n 1)
case $version in
[0-3].* | 4.0.[01] | [0-9].0 | "")
  echo "RELION 4.0.2 or later is needed, which reads a reference for each half-set (found: ${version:-no version})" >&2
  exit 1
  ;;
esac
cp "$reference1" reference_half1.mrc
cp "$reference2" reference_half2.mrc
# shellcheck disable=SC2086 # launcher and further options are lists of words
exec ${MPIRUN:-mpirun -n 3} "$program" --o ./run --i "$particles" --ref reference_half1.mrc --ini_high "$resolution" \
  --auto_refine --split_random_halves --particle_diameter "$diameter" --sym "$symmetry" --low_resol_join_halves 40 \
  --norm --scale --ctf --firstiter_cc --flatten_solvent --zero_mask --oversampling 1 --healpix_order 2 \
  --auto_local_healpix_order 4 --offset_range 5 --offset_step 2 --pad 2 --pool 10 --random_seed "$seed" \
  --dont_combine_weights_via_disc ${MORE:-}
