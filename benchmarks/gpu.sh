#!/usr/bin/env bash
# What a few minutes on a GPU can tell, each part bounded in time and written as JSON:
#
#   bash benchmarks/gpu.sh OUT [SECONDS]      # SECONDS: of all parts together (default 540)
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

nvidia-smi > "$out/device.txt" 2>&1
part tests 150 "$python" -m pytest -q -m gpu tests -p no:cacheprovider
part benchmark_128 60 "$python" -m cryoiso.cli.main benchmark --box 128 --seconds 0.5 --out "$out/benchmark_128.json"
part benchmark_256 60 "$python" -m cryoiso.cli.main benchmark --box 256 --pixel-size 1.06 --seconds 0.5 --miniature 0 --out "$out/benchmark_256.json"
part iteration 180 "$python" benchmarks/gpu_iteration.py --box 256 --pixel-size 1.06 --resolution 3.0 --seconds 120 --out "$out/iteration.json"
part training 90 "$python" -m cryoiso.cli.main benchmark --box 128 --workflow both --seconds 2 --miniature 0 \
  --out "$out/training.json"
cat "$out/parts.json"
