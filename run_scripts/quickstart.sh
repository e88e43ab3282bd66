#!/usr/bin/env bash
# From a clone to a trained LLaMA in one command: installs, makes a corpus of the text every Python carries, trains a tokenizer, writes
# the dataset, trains on two tensor-parallel ranks, and shows what came out. Run it again and only what is missing is done.
set -euo pipefail
cd "$(dirname "$0")/.."
source run_scripts/environment.sh

data=data/quickstart run=runs/quickstart config=configs/quickstart.json
# The config starts anew each time and moves an earlier run aside; here a finished or interrupted run is taken up instead.
ranks=2 overrides=(megastab.run.dir=$run megastab.run.resume=auto)
if [ "$MEGASTAB_DEVICES" -eq 1 ]; then
    ranks=1 overrides+=(megastab.parallel.tensor=1)
elif [ "$MEGASTAB_DEVICES" -eq 0 ]; then
    # bf16 pays on a processor with matrix units for it; elsewhere fp32 is twice as fast.
    grep -q amx_bf16 /proc/cpuinfo 2>/dev/null || overrides+=(bf16.enabled=false)
    cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)))')
    export OMP_NUM_THREADS=$((cores > ranks ? cores / ranks : 1))
fi

[ -e $data.jsonl ] || python -m megastab.data.stdlib_corpus $data.jsonl
[ -e $data.model ] || python tools/train_tokenizer.py --output $data --vocab-size 4096 $data.jsonl
[ -e ${data}_train.idx ] || python tools/prepare_data.py --tokenizer $data.model --output $data --valid-fraction 0.05 $data.jsonl

echo "training on $ranks ranks"
deepspeed --num_gpus $ranks megastab/pretrain.py --deepspeed_config $config "${overrides[@]}"

echo
python tools/report.py $run
echo "a sample:"
python tools/sample.py --run $run --prompt "def " --max-tokens 60 --temperature 0.8 --top-k 40 --seed 1
echo
echo "look at it:   source .venv/bin/activate && tensorboard --logdir $run/tensorboard"
echo "try next:     source .venv/bin/activate && deepspeed --num_gpus 2 megastab/pretrain.py --deepspeed_config $config megastab.parallel.tensor=1 zero_optimization.stage=3"
