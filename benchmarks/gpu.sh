#!/usr/bin/env bash
# What a few minutes on a GPU can tell, each part bounded in time and written as JSON:
#
#   bash benchmarks/gpu.sh OUT [SECONDS]      # SECONDS: of all parts together (default 540)
#   TRIAL=1 bash benchmarks/gpu.sh OUT        # the same parts at tiny sizes, on a CPU as well: does everything start?
#
# 1. tests marked gpu; 2. cryoiso benchmark (results against the CPU's, then rates); 3. one iteration of images of 256 px made
# on the GPU, as many as fit the time; 4. training rates of the generator and of the correction's network.
# Parts that run out of time are noted in OUT/parts.json and do not stop the others.
set -u
out=$(mkdir -p "${1:?usage: gpu.sh OUT [SECONDS]}" && cd "$1" && pwd)
total=${2:-540}
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD MPLBACKEND=Agg
python=${PYTHON:-python}
begun=$SECONDS
printf '{}' > "$out/parts.json"

part() {  # part NAME LIMIT COMMAND...
  local name=$1 limit=$2 left=$((total - (SECONDS - begun))) start=$SECONDS
  shift 2
  [ "$left" -lt "$limit" ] && limit=$left
  if [ "$limit" -lt 10 ]; then note "$name" -1 0; return; fi
  timeout "$limit" "$@" > "$out/$name.log" 2>&1
  note "$name" $? $((SECONDS - start))
}

note() {  # note NAME STATUS SECONDS
  "$python" - "$out/parts.json" "$@" <<'PY'
import json, sys
file, name, status, seconds = sys.argv[1:]
told = {0: "done", 124: "out of time", -1: "no time left"}.get(int(status), f"failed with {status}")
found = json.load(open(file))
found[name] = {"result": told, "seconds": int(seconds)}
json.dump(found, open(file, "w"), indent=1)
print(f"{name}: {told}, {seconds} s", flush=True)
PY
}

benchmark() { part "$1" "$2" "$python" -m cryoiso.cli.main benchmark --out "$out/$1.json" "${@:3}"; }

if [ -n "${TRIAL:-}" ]; then
  middle="--box 32 --pixel-size 4 --seconds 0.05 --miniature 40" large="--box 48 --pixel-size 4 --seconds 0.05"
  iteration="--box 32 --pixel-size 4 --resolution 12 --seconds 5" training="--box 32 --pixel-size 4 --seconds 0.1"
  tests=tests/physics
else
  middle="--box 128 --seconds 0.5" large="--box 256 --pixel-size 1.06 --seconds 0.5"
  iteration="--box 256 --pixel-size 1.06 --resolution 3.0 --seconds 120" training="--box 128 --seconds 2"
  tests=tests
fi
nvidia-smi > "$out/device.txt" 2>&1
part tests 150 "$python" -m pytest -q -m gpu $tests -p no:cacheprovider
benchmark benchmark_128 60 $middle
benchmark benchmark_256 60 $large --miniature 0
part iteration 180 "$python" benchmarks/gpu_iteration.py $iteration --out "$out/iteration.json"
benchmark training 90 $training --workflow both --miniature 0
cat "$out/parts.json"
