"""Import hooks for two packages that SGLang imports and that need CUDA to load. Imports only the standard library."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, NoReturn

#: Environment variable: 1 selects SGLang's CPU engine.
VARIABLE = "SGLANG_USE_CPU_ENGINE"
#: Replaced modules, and the modules of their functions, which are imported on first use since they need torch.
STAND_INS = {"sgl_kernel": "sglang_cpu.speculative", "sgl_kernel.mamba": "sglang_cpu.linear_attention"}


class _StandInLoader(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__

        def attribute(kernel: str) -> Callable[..., Any]:
            # Dunders are probed by inspect, pickle and copy; they must look absent, not like kernels.
            if kernel.startswith("__"):
                raise AttributeError(kernel)
            functions = importlib.import_module(STAND_INS[name])
            return getattr(functions, kernel) if kernel in functions.__all__ else _missing_kernel(name, kernel)

        module.__dict__["__version__"] = "0.0.0+standin"
        module.__dict__["__getattr__"] = attribute


def _missing_kernel(module: str, name: str) -> Callable[..., NoReturn]:
    def missing(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{module}.{name} has no CPU version; sglang_cpu provides its name only")

    missing.__name__ = missing.__qualname__ = name
    return missing


class SglKernelFinder(MetaPathFinder):
    """Provides a stand-in for `sgl_kernel`, whose wheels all need CUDA.

    It has only the submodules with functions here: SGLang imports others (`sgl_kernel.scalar_type`) inside `try` and
    continues without them.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "sgl_kernel":
            return ModuleSpec(fullname, _StandInLoader(), is_package=True)
        # An installed sgl_kernel has its own submodules.
        parent = getattr(sys.modules.get("sgl_kernel"), "__spec__", None)
        if fullname in STAND_INS and parent is not None and isinstance(parent.loader, _StandInLoader):
            return ModuleSpec(fullname, _StandInLoader())
        return None


class TorchvisionFinder(MetaPathFinder):
    """Defines the operators that torchvision's Python files describe but its unloadable library does not provide.

    Finds nothing itself. It acts where torchvision has tried its library and is about to describe the operators:
    at that point `_has_ops` reports whether they exist, so a CPU build of torchvision is left alone.
    """

    library: Any = None  # torch drops the definitions with this object

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "torchvision._meta_registrations" and self.library is None:
            extension = sys.modules.get("torchvision.extension")
            if extension is not None and not extension._has_ops():
                import torch

                self.library = torch.library.Library("torchvision", "FRAGMENT")
                for operator in ("nms", "qnms"):
                    self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


class SglangFinder(MetaPathFinder):
    """Explains why SGLang does not load on a machine without a GPU if its CPU engine is not selected.

    SGLang's plugins load too late: the package's first lines import modules that need CUDA.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "sglang":
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _ExplainingLoader(spec.loader)
        return spec


class _ExplainingLoader(Loader):
    """A loader that ends the process with one sentence if its module cannot be loaded."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        try:
            self._loader.exec_module(module)
        except Exception as error:
            if os.environ.get(VARIABLE) == "1" or os.path.exists("/dev/nvidiactl"):
                raise
            raise SystemExit(
                f"sglang_cpu: SGLang does not load on this machine, which has no GPU ({error}). Set {VARIABLE}=1 for "
                "its CPU engine."
            ) from None


def at_start() -> None:
    """Run at the start of every interpreter of the environment: `install`, if SGLang's CPU engine is selected."""
    if os.environ.get(VARIABLE) == "1":
        install()
    else:
        sys.meta_path.insert(0, SglangFinder())


def install() -> None:
    """Install both finders, once per interpreter."""
    if any(isinstance(finder, SglKernelFinder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, TorchvisionFinder())
    # Last, so that an installed sgl_kernel has precedence.
    sys.meta_path.append(SglKernelFinder())
