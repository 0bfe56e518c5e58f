"""Two packages from two source roots: `margingate` and `margingate_kernels`."""

from setuptools import find_packages, setup

setup(
    name="margingate",
    version="0.1.0",
    description="SGLang answers that do not depend on what else is in the batch",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    package_dir={
        "margingate": "python/margingate",
        "margingate_kernels": "sgl-kernel-patches/margingate_kernels",
    },
    packages=find_packages("python") + find_packages("sgl-kernel-patches"),
    package_data={"margingate": ["py.typed", "data/*.jsonl"], "margingate_kernels": ["py.typed"]},
    install_requires=[
        "sglang==0.5.17",
        "gguf>=0.10",
        "rich",
        "matplotlib",
        "scipy",
        "msgspec",
        "pyzmq>=25.1.2",
    ],
    extras_require={
        "test": ["pytest", "hypothesis", "ruff==0.17.6", "mypy==2.4.1", "openai"],
    },
    entry_points={
        "console_scripts": ["margingate = margingate.cli.main:main"],
        "sglang.srt.plugins": ["margingate = margingate.plugin:load"],
        "sglang.srt.platforms": ["margingate_host = margingate.plugin:host_platform"],
    },
)
