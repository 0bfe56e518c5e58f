"""Two packages from two source roots: `margingate` and `margingate_kernels`."""

from pathlib import Path

from setuptools import find_packages, setup

# The start serves exactly these two (runtime/compat/release.py). For pip they are a range, in which
# editions of the older one lie that nobody has looked at.
SGLANG = "sglang>=0.5.22,<=0.5.23" + "".join(f",!=0.5.22.post{n}" for n in range(1, 10))

setup(
    name="margingate",
    version="0.2.0",
    description="SGLang answers that do not depend on what else is in the batch",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["sglang", "llm", "inference", "determinism", "batch invariance", "reproducibility"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11,<3.13",
    package_dir={
        "margingate": "python/margingate",
        "margingate_kernels": "sgl-kernel-patches/margingate_kernels",
    },
    packages=find_packages("python") + find_packages("sgl-kernel-patches"),
    package_data={
        "margingate": ["py.typed", "data/*.jsonl"],
        "margingate_kernels": ["py.typed", "csrc/*.cuh"],
    },
    # aiohttp, numpy, psutil, requests, torch, transformers and triton come with this SGLang, in the
    # versions that it pins; a second pin here could only disagree.
    install_requires=[
        SGLANG,
        "gguf>=0.10",
        "rich",
        "matplotlib",
        "scipy",
        "msgspec",
        "pyzmq>=25.1.2",
    ],
    extras_require={
        "test": [
            "pytest",
            "pytest-xdist>=3.7",
            "hypothesis",
            "ruff==0.17.6",
            "mypy==2.4.1",
            "openai",
        ],
    },
    entry_points={
        "console_scripts": ["margingate = margingate.cli.main:main"],
        "sglang.srt.plugins": ["margingate = margingate.plugin:load"],
        "sglang.srt.platforms": ["margingate_host = margingate.plugin:host_platform"],
    },
)
