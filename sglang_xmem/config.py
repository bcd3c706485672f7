"""Parse the user's options, from flags, keywords, variables and JSON to checked values. No other module reads them."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import stat
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

import msgspec

from sglang_xmem.copies.tuning import CudaTuning, Direction, defaults_of
from sglang_xmem.errors import SGLANG_FLAGS, ConfigError, FlagStyle, SettingError, sentence
from sglang_xmem.tiers import tier_classes

AUTO = "auto"
CONFIG_OPTION = SGLANG_FLAGS.config
#: Environment variables with the defaults of the two options.
TIER_VARIABLE = "SGLANG_XMEM_TIER"
CONFIG_VARIABLE = "SGLANG_XMEM_CONFIG"
#: Maximum size of a configuration file, in bytes.
MOST_FILE_BYTES = 1 << 20

Kernel = Literal["auto", "cuda", "triton", "torch"]
Level = Literal["off", "sample", "full"]
#: Key of the configuration that selects the pages with sums, and its values; the first is the default.
INTEGRITY = "integrity"
_LEVELS: tuple[Level, ...] = ("sample", "off", "full")
_DIRECTIONS: tuple[Direction, ...] = ("load", "store")
#: Bounds of `copy.staging_mib`, if not 0.
_LEAST_STAGING_MIB, _MOST_STAGING_MIB = 32, 1 << 14


class CopySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The `copy` key of --hicache-xmem-config.

    Attributes:
        kernel: the page copier; `auto` is `cuda` on a GPU and `torch` without one.
        load, store: overrides of the copier's measured settings for a direction, such as {"ctas": 16}: fields of
            `sglang_xmem.copies.tuning.CudaTuning`. `triton` supports only `ctas`, `torch` none.
        staging_mib: GPU staging memory (MiB) through which the copy engines load from host memory; 0: the kernel does
            all loads.
        share_loads: ranks that hold the same bytes each load a share over their own PCIe link and fetch the rest over
            NVLink.
    """

    kernel: Kernel = "auto"
    load: dict[str, Any] = {}
    store: dict[str, Any] = {}
    staging_mib: int = 0
    share_loads: bool = False


class Options(msgspec.Struct, frozen=True):
    """The user's checked options.

    Attributes:
        tier: `auto` or a tier's name.
        copy: settings of the page copier.
        tiers: settings of every tier by its name, defaults included.
        flags: the option names that the user used, for messages.
        integrity: which pages are compared with what was stored: none, one in 16, or all.
    """

    tier: str
    copy: CopySettings
    tiers: dict[str, Any]
    flags: FlagStyle = SGLANG_FLAGS
    integrity: Level = "sample"


def parse_options(
    tier: str | None = None, config: str | dict[str, Any] | None = None, flags: FlagStyle = SGLANG_FLAGS
) -> Options:
    """Check the user's values.

    Args:
        tier: value of --hicache-xmem-tier; None: SGLANG_XMEM_TIER, else auto.
        config: value of --hicache-xmem-config: a JSON object as text, `@` and a file's path, or a dict; None:
            SGLANG_XMEM_CONFIG, else nothing.
        flags: names of the two options.

    Raises:
        ConfigError: an unknown tier or key, a wrong type or value, a file that cannot be read, text that is not JSON.
    """
    if tier is None:
        tier = os.environ.get(TIER_VARIABLE) or None
        flags = flags if tier is None else flags._replace(tier=TIER_VARIABLE)
    if config is None:
        config = os.environ.get(CONFIG_VARIABLE) or None
        flags = flags if config is None else flags._replace(config=CONFIG_VARIABLE)
    classes = tier_classes()
    if tier is None:
        tier = AUTO
    if not isinstance(tier, str) or tier not in (AUTO, *classes):
        raise ConfigError(f"{flags.tier} is {tier!r}. Give one of {', '.join([AUTO, *classes])}.")
    raw = _read_config(config, flags.config)
    sections: dict[str, type[msgspec.Struct]] = {name: cls.Settings for name, cls in classes.items()}
    sections["copy"] = CopySettings
    _reject_unknown(raw, [*sections, INTEGRITY], "", flags.config)
    integrity = raw.get(INTEGRITY, _LEVELS[0])
    if integrity not in _LEVELS:
        raise ConfigError(f"{flags.config} {INTEGRITY!r} is {_short(integrity)}. Give {_or(_LEVELS)}.")
    try:
        parsed: dict[str, Any] = {}
        for name, kind in sections.items():
            parsed[name] = _section(name, kind, raw.get(name, {}), flags)
        copy = parsed.pop("copy")
        for direction in _DIRECTIONS:
            _check_tuning(direction, getattr(copy, direction))
        _check_staging(copy)
        options = Options(tier=tier, copy=copy, tiers=parsed, flags=flags, integrity=integrity)
        _check_kernel(options)
    except SettingError as error:
        raise ConfigError(sentence(error, flags)) from None
    return options


# ---- text to JSON ----


def _read_config(config: str | dict[str, Any] | None, option: str) -> dict[str, Any]:
    if config is None or config == "":
        return {}
    value: Any = config
    if isinstance(config, str):
        text, source = config, f"{option} {_short(config)}"
        if config.startswith("@"):
            path = os.path.expanduser(config[1:])
            source = f"{option} file {path!r}"
            text = _read_file(path, source)
        try:
            value = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{source} is not JSON ({error}). Give an object like '{{\"peer\": {{}}}}'.") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{option} is {_short(value)}. Give a JSON object with one key per tier.")
    return value


def _read_file(path: str, source: str) -> str:
    """Read a regular file of at most MOST_FILE_BYTES; refuse devices and pipes, which may block or never end."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        with open(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(f"{source} is not a regular file. Name a JSON file.")
            data = file.read(MOST_FILE_BYTES + 1)
        if len(data) > MOST_FILE_BYTES:
            raise ConfigError(f"{source} has more than {MOST_FILE_BYTES >> 20} MiB. Name a smaller JSON file.")
        return data.decode("utf-8-sig")
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        if "\0" in path:
            reason = "the path has a zero byte"
        raise ConfigError(f"{source} cannot be read ({reason}). Name a readable JSON file.") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object; refuse a duplicate key, for which Python would use the last value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a valid JSON number")


# ---- JSON to settings ----


def _reject_unknown(given: Mapping[Any, Any], known: Collection[str], where: str, option: str) -> None:
    for key in given:
        if key not in known:
            raise ConfigError(f"{option} has an unknown key {_short(key)}{where}. Known keys: {', '.join(known)}.")


def _section(name: str, kind: type[msgspec.Struct], value: Any, flags: FlagStyle) -> msgspec.Struct:
    if not isinstance(value, dict):
        raise ConfigError(f"{flags.config} {name!r} is {_short(value)}. Give a JSON object.")
    _reject_unknown(value, kind.__struct_fields__, f" in {name!r}", flags.config)
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _wrong(error, name, kind, value) from None


def _wrong(error: Exception, section: str, kind: type[msgspec.Struct], value: dict[str, Any]) -> SettingError:
    """Convert msgspec's message (`Expected ..., got ... - at `$.key[0]``) to a setting, its value and the fix."""
    message, _, path = str(error).partition(" - at `$")
    path = path.rstrip("`")
    found: Any = value
    hint: Any = kind
    for key, index in re.findall(r"\.(\w+)|\[(\d+|\.\.\.)\]", path):
        if key and isinstance(found, dict) and key in found:
            found, hint = found[key], typing.get_type_hints(kind).get(key, hint) if hint is kind else hint
        elif index.isdigit() and isinstance(found, list | tuple):
            found = found[int(index)]
    choices = _choices(hint)
    if message.startswith("Invalid enum value") and choices:
        fix = f"give {_or(choices)}"
    else:
        match = re.match(r"Expected `(.*?)`(?:, got .*)?$", message)
        if match is None:
            return SettingError(f"{section}{path}", f"is {_short(found)} ({message})", "give another value")
        fix = f"give {_or(_NAMES.get(name, name) for name in match[1].split(' | '))}"
    return SettingError(f"{section}{path}", f"is {_short(found)}", fix)


#: JSON types in messages.
_NAMES = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}


def _choices(hint: Any) -> list[str]:
    """Return the values of a Literal, also inside a union."""
    if typing.get_origin(hint) is Literal:
        return [str(value) for value in typing.get_args(hint)]
    return [choice for argument in typing.get_args(hint) for choice in _choices(argument)]


def _or(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


def _short(value: Any) -> str:
    """Format a value as the user wrote it, truncated if long."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


# ---- copies ----


@functools.cache
def _tuning_types() -> dict[str, Any]:
    return typing.get_type_hints(CudaTuning)


def _check_tuning(direction: Direction, changes: Mapping[str, Any]) -> None:
    """Validate overrides on every tuning that they may apply to: the tuning is chosen later, and must not fail then.

    Raises:
        SettingError: one is unknown or out of range.
    """
    known = _tuning_types()
    for key, value in changes.items():
        setting = f"copy.{direction}.{key}"
        if key not in known:
            raise SettingError(setting, "is unknown", f"known keys: {', '.join(known)}")
        try:
            msgspec.convert(value, known[key])
        except msgspec.ValidationError:
            choices = _choices(known[key])
            fix = _or(choices) if choices else _NAMES[known[key].__name__]
            raise SettingError(setting, f"is {_short(value)}", f"give {fix}") from None
    for tuning in defaults_of(direction):
        try:
            dataclasses.replace(tuning, **changes)
        except ValueError as error:
            reason = str(error).split(" in ", 1)[0]
            key = reason.split("=", 1)[0]
            if key in changes:
                problem = f"is {_short(changes[key])}, which is out of range"
                raise SettingError(f"copy.{direction}.{key}", problem, "give another value") from None
            problem = f"is {_short(dict(changes))}: {reason}"
            raise SettingError(f"copy.{direction}", problem, "give values that fit together") from None


def _check_staging(copy: CopySettings) -> None:
    """Refuse staging memory that is out of range or unused, and loading methods that exclude each other.

    Raises:
        SettingError: a setting is invalid.
    """
    mib = copy.staging_mib
    if copy.share_loads and (mib or copy.kernel not in (AUTO, "cuda")):
        other = f"copy.staging_mib is {mib}" if mib else f"copy.kernel is {copy.kernel}"
        raise SettingError("copy.share_loads", f"is true and {other}", "leave one of them out")
    if mib == 0:
        return
    if not _LEAST_STAGING_MIB <= mib <= _MOST_STAGING_MIB:
        fix = f"give {_LEAST_STAGING_MIB} to {_MOST_STAGING_MIB}, or 0 for none"
        raise SettingError("copy.staging_mib", f"is {mib}", fix)
    if copy.kernel not in (AUTO, "cuda"):
        raise SettingError("copy.staging_mib", f"is {mib} and copy.kernel is {copy.kernel}", "leave it out")


def check_copies(options: Options, *, on_gpu: bool) -> None:
    """Refuse copiers and copier settings that the engine's device does not support.

    Raises:
        ConfigError: one sentence.
    """
    try:
        kernel = options.copy.kernel
        if kernel in ("cuda", "triton") and not on_gpu:
            raise SettingError("copy.kernel", f"is {kernel}, but the engine runs on the CPU", "leave it out")
        if kernel == "torch" and on_gpu:
            raise SettingError("copy.kernel", "is torch, but the engine runs on a GPU", "give cuda or triton")
        if kernel == AUTO and not on_gpu:
            _check_changes(options.copy, "torch", "the engine runs on the CPU")
    except SettingError as error:
        raise ConfigError(sentence(error, options.flags)) from None


def _check_kernel(options: Options) -> None:
    """Refuse settings that the user's kernel ignores.

    Raises:
        SettingError: a setting is for another kernel.
    """
    copy = options.copy
    if copy.kernel in (AUTO, "cuda"):
        return
    _check_changes(copy, copy.kernel, f"copy.kernel is {copy.kernel}")
    for tier, settings in options.tiers.items():
        if options.tier not in (AUTO, tier):
            continue
        asked = {
            "copy_on": getattr(settings, "copy_on", None) == "peer",
            "relays": bool(getattr(settings, "relays", ())),
        }
        for key in (key for key, other_gpu in asked.items() if other_gpu):
            problem = f"asks for copies by another GPU, and copy.kernel is {copy.kernel}"
            raise SettingError(f"{tier}.{key}", problem, "leave it out, or set 'copy.kernel' to cuda")


def _check_changes(copy: CopySettings, kernel: str, because: str) -> None:
    takes = ("ctas",) if kernel == "triton" else ()
    for direction in _DIRECTIONS:
        for key, value in getattr(copy, direction).items():
            if key not in takes:
                raise SettingError(f"copy.{direction}.{key}", f"is {_short(value)} and {because}", "leave it out")
