#!/usr/bin/env bash
# Several hosts:   HOSTFILE=hosts run_scripts/multi_node.sh CONFIG [section.key=value ...]
#   hosts has a line "NAME slots=RANKS" for each host. This folder must be at the same path on all of them (a shared file system).
#   Over ssh (pdsh here, passwordless ssh to every host) it is started once, on the first host.
#   Without ssh it is started on every host:   NODE_RANK=0 MASTER_ADDR=FIRST_HOST HOSTFILE=hosts run_scripts/multi_node.sh CONFIG ...
#   MASTER_PORT chooses the port (29500); variables named NCCL_*, GLOO_*, OMP_* and MEGASTAB_* reach every host.
set -euo pipefail
cd "$(dirname "$0")/.."
source run_scripts/environment.sh
config="${1:?give a config, such as configs/llama_1b.json}"
shift
hosts="${HOSTFILE:?give HOSTFILE, a file with a line 'NAME slots=RANKS' for each host}"
MEGASTAB_HOSTS="$(python -m megastab.config.hostfile "$hosts")" # NAME:RANKS,... or an error that names the line
export MEGASTAB_HOSTS
launch=(deepspeed --hostfile "$hosts" --master_port "${MASTER_PORT:-29500}" ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"})
job=(megastab/pretrain.py --deepspeed_config "$config" "$@")

if [ -n "${NODE_RANK:-}" ]; then
    : "${MASTER_ADDR:?give MASTER_ADDR, the address of the first host}"
    exec "${launch[@]}" --no_ssh --node_rank "$NODE_RANK" "${job[@]}"
fi

command -v pdsh > /dev/null || { echo "error: no pdsh here: install it, or start this on every host with NODE_RANK and MASTER_ADDR" >&2; exit 2; }
for host in ${MEGASTAB_HOSTS//,/ }; do
    host="${host%:*}"
    said="$(ssh -o BatchMode=yes -o ConnectTimeout=10 "$host" "test -e '$PWD/setup.py' && echo here || echo missing" 2>&1)" ||
        { echo "error: host $host of $hosts cannot be reached over ssh (${said:-no answer}): mend it, or take it out of the file" >&2; exit 2; }
    [ "${said##*$'\n'}" = here ] || { echo "error: host $host has no $PWD: put the checkout at one path, shared by all hosts" >&2; exit 2; }
done

# DeepSpeed carries few variables to other hosts; those of this file it carries.
DS_ENV_FILE="$(mktemp)"
export DS_ENV_FILE
trap 'rm -f "$DS_ENV_FILE"' EXIT
{
    grep -hE '^[A-Za-z_]+[A-Za-z_0-9]*=' ~/.deepspeed_env .deepspeed_env 2> /dev/null || true
    env | grep -E '^(NCCL_|GLOO_|OMP_|MEGASTAB_|DS_ACCELERATOR=|CUDA_DEVICE_MAX_CONNECTIONS=)' || true
} > "$DS_ENV_FILE"
# An ssh whose host is gone ends within half a minute, and pdsh with it.
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -o ServerAliveInterval=10 -o ServerAliveCountMax=3"
"${launch[@]}" "${job[@]}"
