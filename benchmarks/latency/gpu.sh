#!/usr/bin/env bash
# Everything that needs a GPU, in under nine minutes, on a machine without a network whose python3 has torch, triton and
# transformers.
#
#   bash benchmarks/latency/gpu.sh wheels WHEELS    where there is a network: fetch what such a machine lacks
#   bash benchmarks/latency/gpu.sh OUT [WHEELS]     there: install the wheels beside python3, test, measure
#
# OUT receives latency.json (cell by cell, also when the time runs out), latency.txt and tests.txt. DEVICE, SUITE,
# SECONDS_MEASURING, PYTHON and COMMIT (of the code, where its repository is not at hand) may be set.
set -euo pipefail
cd "$(dirname "$0")/../.."

LACKING=(peft accelerate psutil tabulate tqdm pytest iniconfig pluggy pygments pytest-benchmark py-cpuinfo)
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
SUITE=${SUITE:-full}
SECONDS_MEASURING=${SECONDS_MEASURING:-380}

if [ "$1" = wheels ]; then
  exec "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --platform manylinux_2_12_x86_64 \
    --platform manylinux2010_x86_64 --platform any --dest "$2" "${LACKING[@]}"
fi

out=$1
mkdir -p "$out"
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
if [ -n "${2:-}" ]; then
  site=$(mktemp -d)
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$2"/*.whl
  export PYTHONPATH=$PWD:$site
fi

failed=0
timeout 100 "$PYTHON" -m pytest -q -p no:cacheprovider -o filterwarnings=default \
  tests/test_device.py tests/test_latency_gate.py tests/test_latency_backends.py >"$out/tests.txt" 2>&1 || failed=1
tail -n 3 "$out/tests.txt"
timeout $((SECONDS_MEASURING + 60)) "$PYTHON" -m lora_check bench --device "$DEVICE" --suite "$SUITE" \
  --seconds "$SECONDS_MEASURING" --commit "${COMMIT:-}" --output "$out/latency.json" >"$out/latency.txt" || failed=$?
[ -s "$out/latency.txt" ] || "$PYTHON" -m lora_check bench show "$out/latency.json" >"$out/latency.txt" || failed=$?
tail -n 40 "$out/latency.txt"
exit "$failed"
