#!/usr/bin/env bash
# The one test command: style, types, tests.   run_scripts/test.sh [--long] [pytest arguments]
# Everything but what is marked `long` takes about 20 minutes on two cores; --long runs the rest as well.
set -euo pipefail
cd "$(dirname "$0")/.."
source run_scripts/environment.sh test
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1

marks=(-m "not long")
if [ "${1:-}" = "--long" ]; then
    marks=() && shift
fi
# Test files are dealt out to worker processes (how many: tests/conftest.py; PYTEST_XDIST_AUTO_NUM_WORKERS=4 or `-n 4` chooses, `-n 0` has
# none, for `-s` and a debugger). A file stays in one worker because its tests share jobs; the long ones come first in the tests' own order.
workers=()
if python -c 'import xdist' 2> /dev/null; then
    workers=(-n auto --dist loadfile --no-loadscope-reorder)
fi
ruff check .
ruff format --check --quiet .
mypy
python -m pytest "${workers[@]}" "${marks[@]}" "$@"
