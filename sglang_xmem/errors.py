"""Errors of sglang_xmem, and the one function that formats them: "Problem. Fix." with the option and its value.

The problem and its remedies are data, because another engine has other flag names: the caller that shows an error
passes its own names to `sentence`. Imports only the standard library.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Literal, NamedTuple, NoReturn

#: Exit status of a scheduler that refused to start, which the launcher distinguishes from a crash (EX_CONFIG of
#: sysexits.h).
REFUSED_EXIT_STATUS = 78


class FlagStyle(NamedTuple):
    """The names of the options in one engine, for messages.

    Attributes:
        size: the option or options that set the pool's size.
        tier: the option that names a tier.
        config: the option that holds settings.
    """

    size: str
    tier: str
    config: str


SGLANG_FLAGS = FlagStyle("--hicache-size or --hicache-ratio", "--hicache-xmem-tier", "--hicache-xmem-config")

RemedyKind = Literal[
    "lower_size", "use_tier", "set_option", "leave_out", "install", "start_service", "set_variable", "do"
]


class Remedy(NamedTuple):
    """One fix of a problem; several remedies of an error are alternatives.

    Attributes:
        kind: `lower_size`: a smaller pool. `use_tier`: tier `value`. `set_option`: set `option` (such as "peer.gpus")
            to `value`, or to another value if that is None. `leave_out`: remove setting `option`. `install`: run the
            command `value`. `start_service`: start `value`. `set_variable`: set the environment variable `option` to
            `value`, or unset it if that is None. `do`: a clause that names no option of this package.
    """

    kind: RemedyKind
    option: str | None = None
    value: str | None = None


LOWER_SIZE = Remedy("lower_size")


class ConfigError(ValueError):
    """A user error in a flag, a keyword or the configuration; raised before anything is allocated."""


class SettingError(ConfigError):
    """A setting of --hicache-xmem-config that is impossible.

    Args:
        setting: its name, such as "dram.threads".
        problem: what follows the name: "is 1025".
        fix: an imperative clause: "give 1 to 1024".
    """

    def __init__(self, setting: str, problem: str, fix: str) -> None:
        super().__init__(setting, problem, fix)
        self.setting, self.problem, self.fix = setting, problem, fix

    def __str__(self) -> str:
        return sentence(self)


class Unavailable(Exception):
    """This machine cannot provide something, or cannot provide it now.

    `auto` skips such a tier and reports the reason; an explicit choice turns it into a ConfigError.

    Args:
        reason: a clause without a full stop.
        remedies: fixes; each is an alternative.
    """

    def __init__(self, reason: str, *remedies: Remedy) -> None:
        super().__init__(reason, *remedies)
        self.reason = reason
        self.remedies = remedies

    def __str__(self) -> str:
        """Return `reason; fix` with SGLang's flags."""
        return clause(self.reason, self.remedies)


class CopyError(RuntimeError):
    """A page copy could not be prepared or enqueued."""


class UnsupportedSGLang(RuntimeError):
    """This package cannot patch the installed SGLang."""


def sentence(error: Exception, flags: FlagStyle = SGLANG_FLAGS) -> str:
    """Format an error for users: "Problem. Fix."

    Args:
        flags: names of the options in the engine that shows the message.
    """
    if isinstance(error, SettingError):
        return f"{flags.config} {error.setting!r} {error.problem}. {_capital(error.fix)}."
    if isinstance(error, Unavailable):
        fix = fixes(error.remedies, flags)
        return f"{_capital(error.reason)}.{f' {_capital(fix)}.' if fix else ''}"
    return str(error)


def clause(reason: str, remedies: Iterable[Remedy], flags: FlagStyle = SGLANG_FLAGS) -> str:
    """Return `reason; fix`, for lists of reasons."""
    fix = fixes(remedies, flags)
    return f"{reason}; {fix}" if fix else reason


def fixes(remedies: Iterable[Remedy], flags: FlagStyle = SGLANG_FLAGS) -> str:
    """Join remedies into one imperative clause of alternatives, empty without remedies."""
    words = [_fix(remedy, flags) for remedy in remedies]
    return ", or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _fix(remedy: Remedy, flags: FlagStyle) -> str:
    kind, option, value = remedy
    if kind == "lower_size":
        return f"lower {flags.size}"
    if kind == "use_tier":
        return f"use {flags.tier} {value}"
    if kind == "set_option":
        return f"set {flags.config} {option!r} to {'another value' if value is None else value}"
    if kind == "leave_out":
        return f"leave {option!r} out of {flags.config}"
    if kind == "install":
        return f"run {value}"
    if kind == "start_service":
        return f"start {value}"
    if kind == "set_variable":
        return f"unset {option}" if value is None else f"set {option} to {value}"
    return str(value)


def _capital(text: str) -> str:
    """Capitalize `text`, unless its first word is an identifier."""
    first = text.split(" ", 1)[0].rstrip(",;:")
    return text[:1].upper() + text[1:] if first.isalpha() else text


def refuse(message: str) -> NoReturn:
    """End this process with `message` alone on stderr and status REFUSED_EXIT_STATUS.

    SystemExit passes through SGLang's `except Exception` handlers, which would print a traceback or continue.
    """
    sys.stderr.write(f"sglang_xmem: {message}\n")
    sys.stderr.flush()
    raise SystemExit(REFUSED_EXIT_STATUS)
