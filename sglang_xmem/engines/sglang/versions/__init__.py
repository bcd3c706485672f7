"""What differs between versions of SGLang: one table per version, plain data that needs no SGLang to be read."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sglang_xmem.engines.sglang.hooks import Hook
from sglang_xmem.errors import UnsupportedSGLang

#: Module of each version's table, newest first.
TABLES = {"0.5.23": "v0_5_23", "0.5.22": "v0_5_22", "0.5.21": "v0_5_21"}


@dataclass(frozen=True)
class VersionTable:
    """A version of SGLang, as far as this package touches it.

    Attributes:
        version: as its distribution says.
        flag_hooks: placed in every process; they only carry the options.
        launcher_hooks: placed in a launcher with the flag on.
        controller_hooks: placed in a data-parallel controller with the flag on.
        scheduler_hooks: placed in a scheduler with the flag on.
        bank_hooks: placed in a scheduler whose pool is in the page bank; none where that is not supported.
        members: dotted names of SGLang that are read, without the hooks' targets.
        reads: class of SGLang -> members of its instances that are read or replaced, separated by spaces. Only
            `scripts/check_versions.py` can look, in SGLang's sources.
        controller_reports: whether a data-parallel controller passes on what its ranks say of the tier.
    """

    version: str
    flag_hooks: tuple[Hook, ...]
    launcher_hooks: tuple[Hook, ...]
    controller_hooks: tuple[Hook, ...]
    scheduler_hooks: tuple[Hook, ...]
    members: tuple[str, ...]
    reads: Mapping[str, str]
    controller_reports: bool = True
    bank_hooks: tuple[Hook, ...] = ()

    @property
    def all_hooks(self) -> tuple[Hook, ...]:
        """Hooks of every process."""
        return (
            *self.flag_hooks,
            *self.launcher_hooks,
            *self.controller_hooks,
            *self.scheduler_hooks,
            *self.bank_hooks,
        )


def with_parameters(hooks: Iterable[Hook], parameters: Mapping[str, tuple[str, ...]]) -> tuple[Hook, ...]:
    """Hooks of another version, where targets take other parameters in this one."""
    return tuple(hook._replace(parameters=parameters.get(hook.target, hook.parameters)) for hook in hooks)


def known() -> tuple[str, ...]:
    """Versions that have a table, newest first."""
    return tuple(TABLES)


def load(version: str) -> VersionTable:
    """The table of a version; for one that is newer than all tables, the newest one's, to be verified and tried out.

    Raises:
        UnsupportedSGLang: there is none; the message names the versions that have one.
    """
    base = _base(version)
    newest = next(iter(TABLES))
    name = base if base in TABLES else newest if _release(base) > _release(newest) else None
    if name is None:
        raise UnsupportedSGLang(
            f"SGLang {version} is installed, and sglang_xmem works with {', '.join(TABLES)}. Run pip install "
            f"sglang=={newest}."
        )
    table: VersionTable = importlib.import_module(f"{__name__}.{TABLES[name]}").TABLE
    return table


def proven(version: str) -> bool:
    """Whether a version has a table of its own, with which it was tested."""
    return version in TABLES


def _base(version: str) -> str:
    """A version without its post-release or local part: a rebuild of the same sources."""
    return version.split("+")[0].split(".post")[0]


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def installed() -> str:
    """The version of SGLang that is installed.

    Raises:
        UnsupportedSGLang: none is.
    """
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        raise UnsupportedSGLang("SGLang is not installed. Run pip install sglang.") from None


def current() -> VersionTable:
    """The table of the SGLang that is installed.

    Raises:
        UnsupportedSGLang: it has none, or SGLang is not installed.
    """
    return load(installed())
