"""Puts sglang_cpu.pth next to the package, where every interpreter of the environment reads it at startup."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PTH = "sglang_cpu.pth"


class BuildWithPth(build_py):
    """`data_files` cannot name site-packages portably; the root of the built library is installed there."""

    def run(self) -> None:
        super().run()
        Path(self.build_lib).mkdir(parents=True, exist_ok=True)
        self.copy_file(PTH, str(Path(self.build_lib) / PTH))


setup(cmdclass={"build_py": BuildWithPth})
