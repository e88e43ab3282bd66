"""Imported once by the fork server; must start no thread and no parallel work."""

import os
import warnings

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"
warnings.simplefilter("ignore")
