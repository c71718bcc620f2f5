#!/usr/bin/env bash
# GPU tests and GPU benchmarks in one go, under ten minutes: benchmarks/speed/gpu.sh [FOLDER]
#
# For a bare machine: a python3 (or $PYTHON) with PyTorch, Triton, Transformers, pyarrow, pytest, pytest-benchmark and
# matplotlib; no network, and no installation of tokensel. Without git, TOKENSEL_COMMIT names the commit. Writes
# tests.xml, gpu.CHIP.json, its tables (gpu.CHIP.txt), plots, and the rates that impl="auto" reads (rates.json: goes to
# kernels/) into FOLDER, or $OUT, or benchmarks/results. Files and tables carry the chip's name; chips are never mixed.
# Ends with the tests' status, or the benchmarks'.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit
python=${PYTHON:-python3}
out=${1:-${OUT:-benchmarks/results}}
mkdir -p "$out"

missing=
for module in pytest pytest_benchmark torch triton transformers pyarrow matplotlib; do
    "$python" -c "import $module" || missing+=" $module"
done
[ -z "$missing" ] || { echo "$python cannot import:$missing (or set PYTHON)" >&2; exit 2; }

# What an installation does: kernels/ is found as tokensel_kernels.
link=$(mktemp -d)
trap 'rm -rf "$link"' EXIT
ln -s "$PWD/kernels" "$link/tokensel_kernels"
export PYTHONPATH="$PWD:$link${PYTHONPATH:+:$PYTHONPATH}"

# An interrupt, so that pytest writes what it has; 180 + 330 s.
timeout -s INT -k 10 180 "$python" -m pytest tests/ops/test_kernels*.py -q --junitxml "$out/tests.xml"
tests=$?
chip=$("$python" -c 'import torch
from benchmarks.speed.results import key_of
print(key_of({"device": "cuda", "gpu": torch.cuda.get_device_name()}))') || exit 2
results=$out/gpu.$chip
timeout -s INT -k 10 330 "$python" -m pytest benchmarks --set gpu --minutes 4.5 --results "$results.json" \
    --benchmark-disable -q
benchmarks=$?
"$python" -m benchmarks.speed.tables "$results.json" | tee "$results.txt"
cp kernels/rates.json "$out/rates.json"
"$python" -m benchmarks.speed.rates "$results.json" --into "$out/rates.json"
exit $((tests ? tests : benchmarks))
