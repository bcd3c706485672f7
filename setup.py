# SPDX-License-Identifier: Apache-2.0
"""Build of sglang_xmem; its metadata is in pyproject.toml.

Kernel sources live in the top-level kernels/ and ship as the package sglang_xmem.kernels: sglang_xmem/kernels is a
link to it, so that checkout, editable install and wheel find them under the same name.
"""

from setuptools import find_packages, setup

setup(packages=find_packages(include=["sglang_xmem", "sglang_xmem.*"]))
