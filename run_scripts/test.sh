#!/usr/bin/env bash
# The one test command: style, types, tests.   run_scripts/test.sh [--long] [pytest arguments]
# Everything but what is marked `long` takes about 35 minutes on two cores; --long runs the rest as well.
set -euo pipefail
cd "$(dirname "$0")/.."
source run_scripts/environment.sh test
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1

marks=(-m "not long")
if [ "${1:-}" = "--long" ]; then
    marks=() && shift
fi
ruff check .
ruff format --check --quiet .
mypy
python -m pytest "${marks[@]}" "$@"
