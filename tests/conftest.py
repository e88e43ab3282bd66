"""Every test runs on the CPU with one thread a rank, whatever the machine has."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
