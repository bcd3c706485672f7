"""Memory tiers. A new tier is a new module here; no other code changes."""

from __future__ import annotations

import importlib
import pkgutil

from sglang_xmem.tiers.base import Extent, Health, MemoryTier, Ranks, Region, Traits

__all__ = ["Extent", "Health", "MemoryTier", "Ranks", "Region", "Traits", "tier_classes"]


def tier_classes() -> dict[str, type[MemoryTier]]:
    """Return all tiers by name, fastest first."""
    found: list[type[MemoryTier]] = []
    for module_info in pkgutil.iter_modules(__path__):
        if module_info.name == "base":
            continue
        module = importlib.import_module(f"{__name__}.{module_info.name}")
        found += [
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, MemoryTier) and value.__module__ == module.__name__
        ]
    return {tier.name: tier for tier in sorted(found, key=lambda tier: -tier.nominal_gbps)}
