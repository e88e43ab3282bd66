"""Imported last by the fork server; must start no thread and no parallel work."""

import gc
import os
import warnings

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"
warnings.simplefilter("ignore")
gc.collect()
gc.freeze()  # a rank's collector need not walk the half a million objects of the imports
