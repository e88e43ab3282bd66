"""Trains on two ranks into a run folder on a disk that has room for one checkpoint, not for two. Arguments: run folder, sync or async."""

import sys
from pathlib import Path

from tests.ranks import run_ranks
from tests.unit.checkpoint.test_checkpoint_resume import config_for, train

if __name__ == "__main__":
    run = Path(sys.argv[1])
    run_ranks(2, train, config_for("zero3", run, run__async_save=sys.argv[2] == "async"))
