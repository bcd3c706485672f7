"""The user's options: from flags, keywords and JSON to checked values. The only reader of either."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Annotated, Any, Literal

import msgspec

from sglang_xmem.copies.tuning import CudaTuning, Direction, defaults_of
from sglang_xmem.errors import ConfigError
from sglang_xmem.tiers import tier_classes

AUTO = "auto"
CONFIG_OPTION = "--hicache-xmem-config"


class CopySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The `copy` key of --hicache-xmem-config.

    Attributes:
        kernel: which page copier; `auto` is `cuda` on a GPU and `torch` without one.
        load, store: changes to the copier's measured settings of a direction, such as {"ctas": 16}: fields of
            `sglang_xmem.copies.tuning.CudaTuning`.
        staging_mib: MiB of each rank's GPU for loads from host memory by the copy engine, 0 for none. By default 256,
            or a 512th of a smaller GPU, if they can be had and the kernel is `cuda` without relays.
    """

    kernel: Literal["auto", "cuda", "triton", "torch"] = "auto"
    load: dict[str, int | str | bool] = {}
    store: dict[str, int | str | bool] = {}
    staging_mib: Annotated[int, msgspec.Meta(ge=0, le=65536)] | None = None


class Options(msgspec.Struct, frozen=True):
    """What the user asked for.

    Attributes:
        tier: `auto` or a tier's name.
        copy: settings of the page copier.
        tiers: settings of every tier by its name, defaults included.
    """

    tier: str
    copy: CopySettings
    tiers: dict[str, Any]


def parse_options(tier: str, config: str | dict[str, Any] | None) -> Options:
    """Check the user's values.

    Args:
        tier: value of --hicache-xmem-tier.
        config: value of --hicache-xmem-config: a JSON object as text, `@` and a file's path, or a dict.

    Raises:
        ConfigError: an unknown tier or key, a wrong type, a file that cannot be read, text that is not JSON.
    """
    classes = tier_classes()
    if tier != AUTO and tier not in classes:
        raise ConfigError(f"--hicache-xmem-tier {tier!r} is not known; choose one of {', '.join([AUTO, *classes])}.")
    raw = _read_config(config)
    sections: dict[str, type[msgspec.Struct]] = {name: cls.Settings for name, cls in classes.items()}
    sections["copy"] = CopySettings
    _reject_unknown(raw, sections, "")
    parsed: dict[str, Any] = {}
    for section, settings_type in sections.items():
        value = raw.get(section, {})
        if not isinstance(value, dict):
            raise ConfigError(f"{CONFIG_OPTION}: {section!r} must be a JSON object, not {json.dumps(value)}.")
        _reject_unknown(value, settings_type.__struct_fields__, f" in {section!r}")
        try:
            parsed[section] = msgspec.convert(value, settings_type)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{CONFIG_OPTION}: {section!r} is wrong: {error}.") from None
    copy = parsed.pop("copy")
    directions: tuple[Direction, ...] = ("load", "store")
    for direction in directions:
        try:
            # Which one it will change is decided with the memory, and must not fail then.
            for tuning in defaults_of(direction):
                dataclasses.replace(tuning, **getattr(copy, direction))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{CONFIG_OPTION}: 'copy.{direction}' is {json.dumps(getattr(copy, direction))}: {error}; known keys: "
                f"{', '.join(field.name for field in dataclasses.fields(CudaTuning))}."
            ) from None
    return Options(tier=tier, copy=copy, tiers=parsed)


def _read_config(config: str | dict[str, Any] | None) -> dict[str, Any]:
    if config is None or config == "":
        return {}
    if isinstance(config, str):
        text, source = config, f"{CONFIG_OPTION} {config!r}"
        if config.startswith("@"):
            path = os.path.expanduser(config[1:])
            source = f"{CONFIG_OPTION} file {path!r}"
            try:
                with open(path, encoding="utf-8") as file:
                    text = file.read()
            except (OSError, UnicodeDecodeError) as error:
                reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
                raise ConfigError(f"{source} cannot be read ({reason}); name a readable JSON file.") from None
        try:
            config = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(f"{source} is not JSON ({error}); give an object like '{{\"peer\": {{}}}}'.") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{CONFIG_OPTION} must be a JSON object with a key a tier, not {json.dumps(config)}.")
    return config


def _reject_unknown(given: dict[str, Any], known: Any, where: str) -> None:
    for key in given:
        if key not in known:
            raise ConfigError(f"{CONFIG_OPTION}: unknown key {key!r}{where}; known keys: {', '.join(known)}.")
