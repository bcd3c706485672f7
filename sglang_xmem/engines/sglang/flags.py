"""The flags and keywords of this package on SGLang's command line and `sgl.Engine`; all processes.

SGLang itself is imported inside functions: plugins load early in every process, before SGLang has set up its own.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import msgspec

from sglang_xmem.config import AUTO
from sglang_xmem.errors import ConfigError, refuse
from sglang_xmem.tiers import tier_classes

#: Attribute of a ServerArgs record: a Request, and once the launcher has planned, a Plan. A bookkeeping name: SGLang
#: seals the others, and pickles these along to every process.
ATTRIBUTE = "_sglang_xmem"

#: SGLang's environment variable for machines without a GPU.
CPU_ENGINE = "SGLANG_USE_CPU_ENGINE"
#: Why ranks under Ray have no tier.
WITHOUT_PLUGINS = "Ray's actors start schedulers without loading plugins, so the tier would be left out without a word"


class Request(msgspec.Struct, frozen=True):
    """The user's raw values, on a ServerArgs record. `from_cli`: a mistake ends the command, else it raises."""

    tier: str | None
    config: Any
    from_cli: bool


def _switch(on: bool) -> Any:
    """A parser of `true` or `false` for an option that says so by itself; a --config file spells the value out."""

    def parse(text: str) -> bool | None:
        value = {"true": True, "false": False}.get(text.lower())
        if value is None:
            raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
        return on if value else (None if not on else False)

    return parse


def add_cli_args(result: Any, parser: argparse.ArgumentParser) -> None:
    """Add the options to SGLang's parser (hook)."""
    group = parser.add_argument_group("sglang_xmem: HiCache's L2 pool in faster or larger memory")
    # Plain store actions: SGLang's --config files know no BooleanOptionalAction, and drop a false store_true.
    group.add_argument(
        "--hicache-use-xmem",
        nargs="?",
        const=True,
        default=None,
        type=_switch(True),
        metavar="true|false",
        help="Put the host pool of --enable-hierarchical-cache into a memory tier of sglang_xmem.",
    )
    group.add_argument(
        "--no-hicache-use-xmem",
        dest="hicache_use_xmem",
        nargs="?",
        const=False,
        default=None,
        type=_switch(False),
        metavar="true|false",
        help="Leave HiCache as SGLang has it (default).",
    )
    group.add_argument(
        "--hicache-xmem-tier",
        default=None,
        metavar="{" + ",".join([AUTO, *tier_classes()]) + "}",
        help="Which memory: mtier is X-Mem's banks, peer is HBM of other GPUs, bank is host memory that engines share, "
        "dram is NUMA-placed pinned host memory, "
        "dax is a CXL device; auto (default) uses the fastest that this machine has and that can hold the pool. "
        "Environment: SGLANG_XMEM_TIER.",
    )
    group.add_argument(
        "--hicache-xmem-config",
        default=None,
        metavar="JSON|@FILE",
        help='Settings by tier, such as \'{"peer": {"gpus": [1]}, "dram": {"numa_node": 0}}\'. '
        "Environment: SGLANG_XMEM_CONFIG.",
    )


def from_cli_args(original: Any, cls: Any, args: argparse.Namespace) -> Any:
    """Keep the options' values on the record that SGLang makes of its own (hook)."""
    on = getattr(args, "hicache_use_xmem", None)
    if on and (problem := _no_device(getattr(args, "device", None))):
        refuse(problem)
    record = original(cls, args)
    if on is None:  # neither on nor off; who says where the pool goes expects it there
        for option, value in (
            ("--hicache-xmem-tier", args.hicache_xmem_tier),
            ("--hicache-xmem-config", args.hicache_xmem_config),
        ):
            if value is not None:
                refuse(f"{option} {value} has no effect without --hicache-use-xmem. Add that flag, or leave it out.")
    if on:
        attach(record, Request(args.hicache_xmem_tier, args.hicache_xmem_config, from_cli=True))
    return record


def _no_device(device: str | None) -> str:
    """A sentence where SGLang has nothing to compute on, which it would say by a traceback; empty where it has.

    Args:
        device: SGLang's option, None where it chooses by itself.
    """
    import torch  # SGLang has it by now

    if device not in (None, "cuda") or os.environ.get(CPU_ENGINE) == "1" or torch.cuda.is_available():
        return ""
    return (
        f"This machine has no GPU that CUDA can use, and SGLang is not set to its CPU engine. Set {CPU_ENGINE}=1, or "
        "start it where there is a GPU."
    )


class ServerArgsFactory:
    """Replace `Engine.server_args_class`: removes this package's keywords from the call.

    An object rather than a function: as a class attribute a function would be bound to the engine.
    """

    def __init__(self, original: Any, *, by_ray: bool = False) -> None:
        self.original = original
        self.by_ray = by_ray

    def __get__(self, engine: Any, owner: type) -> ServerArgsFactory:
        """The factory as an engine class has it: one that starts ranks as Ray's actors says so nowhere else."""
        by_ray = any(base.__module__.startswith("sglang.srt.ray.") for base in owner.__mro__)
        return ServerArgsFactory(self.original, by_ray=True) if by_ray else self

    def __call__(self, **kwargs: Any) -> Any:
        said = kwargs.pop("hicache_use_xmem", None)
        tier = kwargs.pop("hicache_xmem_tier", None)
        config = kwargs.pop("hicache_xmem_config", None)
        if said is not None and not isinstance(said, bool):
            raise ConfigError(f"hicache_use_xmem must be True or False, got {said!r}.")
        if said is None:
            for name, value in (("hicache_xmem_tier", tier), ("hicache_xmem_config", config)):
                if value is not None:
                    raise ConfigError(
                        f"{name}={value!r} has no effect without hicache_use_xmem=True. Add that, or leave it out."
                    )
        if said and self.by_ray:
            raise ConfigError(f"hicache_use_xmem=True does not work with RayEngine: {WITHOUT_PLUGINS}. Use sgl.Engine.")
        if said and (problem := _no_device(kwargs.get("device"))):
            raise ConfigError(problem)
        record = self.original(**kwargs)
        if said:
            attach(record, Request(tier, config, from_cli=False))
        return record


def attach(record: Any, request: Any) -> None:
    """Put a Request or a Plan on a ServerArgs record."""
    setattr(record, ATTRIBUTE, request)


def attached(record: Any) -> Any:
    """The Request or Plan on a ServerArgs record; None with the flag off."""
    return getattr(record, ATTRIBUTE, None)
