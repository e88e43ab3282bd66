#!/usr/bin/env bash
# All devices of this machine:   run_scripts/single_node.sh CONFIG [section.key=value ...]      (RANKS=n to use fewer, or on a CPU machine)
set -euo pipefail
cd "$(dirname "$0")/.."
source run_scripts/environment.sh
config="${1:?give a config, such as configs/llama_130m.json}"
shift
exec deepspeed --num_gpus "${RANKS:-$((MEGASTAB_DEVICES > 0 ? MEGASTAB_DEVICES : 1))}" megastab/pretrain.py --deepspeed_config "$config" "$@"
