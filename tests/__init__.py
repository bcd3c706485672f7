"""Tests of sglang_xmem; CONTRIBUTING.md says which folder holds what."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
