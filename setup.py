"""Build of sglang_xmem.

Kernel sources live in the top-level kernels/ and ship as the package sglang_xmem.kernels: sglang_xmem/kernels is a
link to it, so that checkout, editable install and wheel find them under the same name.
"""

from setuptools import find_packages, setup

setup(
    name="sglang_xmem",
    version="0.1.0",
    description="HiCache's L2 pool in faster or larger memory for stock SGLang: peer-GPU HBM, NUMA DRAM, X-Mem",
    python_requires=">=3.10",
    packages=find_packages(include=["sglang_xmem", "sglang_xmem.*"]),
    package_data={
        "sglang_xmem.kernels": ["*.cu"],
        "sglang_xmem.mtier": ["native/*.h", "native/*.cpp"],
        "sglang_xmem": ["py.typed"],
    },
    # torch and sglang come with the user's SGLang installation; naming them here would replace it.
    install_requires=[
        "msgspec>=0.18",
        "numpy",
        "psutil",
        "nvidia-ml-py>=12",
        "cuda-bindings>=13.0",
        "rich>=13",
    ],
    extras_require={
        "sglang": ["sglang==0.5.23"],
        # pip would replace torch for its metadata; --no-deps is enough where SGLang is installed.
        "xmem": ["xmem-mtier==0.1.2"],
        # Plots; benchmarks run without it too.
        "bench": ["matplotlib>=3.8"],
        "dev": [
            "pytest>=8",
            "hypothesis>=6",
            "nvidia-cuda-nvrtc>=13,<14",
            "ruff==0.14.5",
            "mypy==1.18.2",
            "requests",
            "matplotlib>=3.8",
        ],
    },
    entry_points={
        "sglang.srt.plugins": ["sglang_xmem = sglang_xmem.plugin:register"],
        "console_scripts": ["sglang-xmem = sglang_xmem.cli:main"],
    },
)
