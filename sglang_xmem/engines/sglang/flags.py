"""The flags and keywords of this package for SGLang's command line and `sgl.Engine`; in all processes.

SGLang is imported inside functions: plugins load early in every process, before SGLang's own setup.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import msgspec

from sglang_xmem.config import AUTO
from sglang_xmem.errors import ConfigError, refuse
from sglang_xmem.tiers import tier_classes

#: Attribute of a ServerArgs record: a Request, and a Plan once the launcher has planned. The underscore matters: SGLang
#: seals other names, and pickles these to every process.
ATTRIBUTE = "_sglang_xmem"

#: SGLang's environment variable for machines without a GPU.
CPU_ENGINE = "SGLANG_USE_CPU_ENGINE"
#: Reason why ranks under Ray cannot use a tier.
WITHOUT_PLUGINS = "Ray's actors start schedulers without loading plugins, so they would silently serve without the tier"


class Request(msgspec.Struct, frozen=True):
    """The user's raw values, on a ServerArgs record. `from_cli`: an error ends the command instead of raising."""

    tier: str | None
    config: Any
    from_cli: bool


def _switch(on: bool) -> Any:
    """Parse `true` or `false` of an option with an optional value; a --config file always has the value."""

    def parse(text: str) -> bool | None:
        value = {"true": True, "false": False}.get(text.lower())
        if value is None:
            raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
        return on if value else (None if not on else False)

    return parse


def add_cli_args(result: Any, parser: argparse.ArgumentParser) -> None:
    """Add the options to SGLang's parser (hook)."""
    group = parser.add_argument_group("sglang_xmem: HiCache's L2 pool in faster or larger memory")
    # Plain store actions: SGLang's --config files do not support BooleanOptionalAction, and drop a false store_true.
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
        help="Memory tier: mtier (X-Mem's banks), peer (HBM of other GPUs), bank (host memory that engines share), "
        "dram (NUMA-placed pinned host memory), dax (CXL device), or auto (default: the fastest available tier that "
        "can hold the pool). Environment: SGLANG_XMEM_TIER.",
    )
    group.add_argument(
        "--hicache-xmem-config",
        default=None,
        metavar="JSON|@FILE",
        help='Settings by tier, such as \'{"peer": {"gpus": [1]}, "dram": {"numa_node": 0}}\'. '
        "Environment: SGLANG_XMEM_CONFIG.",
    )


def from_cli_args(original: Any, cls: Any, args: argparse.Namespace) -> Any:
    """Attach the options' values to SGLang's record (hook)."""
    on = getattr(args, "hicache_use_xmem", None)
    if on and (problem := _no_device(getattr(args, "device", None))):
        refuse(problem)
    record = original(cls, args)
    if on is None:  # neither on nor off; a user who names a tier expects it to be used
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
    """Return an error sentence if SGLang has no device, for which SGLang prints a traceback; otherwise empty.

    Args:
        device: SGLang's option; None: automatic.
    """
    import torch  # SGLang has imported it by now

    if device not in (None, "cuda") or os.environ.get(CPU_ENGINE) == "1" or torch.cuda.is_available():
        return ""
    return (
        f"CUDA finds no usable GPU, and SGLang's CPU engine is not enabled. Set {CPU_ENGINE}=1, or "
        "start it on a machine with a GPU."
    )


class ServerArgsFactory:
    """Replace `Engine.server_args_class`: removes this package's keywords from the call.

    An object rather than a function: as a class attribute a function would be bound to the engine.
    """

    def __init__(self, original: Any, *, by_ray: bool = False) -> None:
        self.original = original
        self.by_ray = by_ray

    def __get__(self, engine: Any, owner: type) -> ServerArgsFactory:
        """Bind the factory to an engine class, the only way to recognize one that starts ranks as Ray actors."""
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
    """Return the Request or Plan on a ServerArgs record; None with the flag off."""
    return getattr(record, ATTRIBUTE, None)
