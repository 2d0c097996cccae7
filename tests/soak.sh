#!/usr/bin/env bash
# Runs campaigns of hostile files, bad input and bad luck: bash tests/soak.sh [KIND ...] [--seed N] [--count N] [--only N]
# Kinds: files inputs kills power servers signals; all of them by default, which takes about an hour on two cores.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh test
export OMP_NUM_THREADS=1 PYTHONPATH="tests:scripts:$PYTHONPATH"
exec "$PYTHON" -m soak "$@"
