"""Who executes the copies of a rank. Imports no torch."""

from __future__ import annotations

from typing import NamedTuple


class CopyPolicy(NamedTuple):
    """Which GPUs execute a rank's copies.

    Attributes:
        runner: CUDA ordinal of another GPU that executes them in the rank's place.
        required: the user asked for that: no other will do.
        relays: CUDA ordinals of GPUs that each move a share beside the rank or the runner.
    """

    runner: int | None = None
    required: bool = False
    relays: tuple[int, ...] = ()
