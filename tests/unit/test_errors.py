"""Words of errors: problem, fix, and the names that options have where the message is shown."""

from __future__ import annotations

import pickle

import pytest

from sglang_xmem.errors import LOWER_SIZE, FlagStyle, Remedy, SettingError, Unavailable, sentence

FLAGS = FlagStyle("--cache-gb", "--tier", "--tier-config")


@pytest.mark.parametrize(
    ("remedies", "fix"),
    [
        ((), ""),
        ((LOWER_SIZE,), " Lower --cache-gb."),
        ((Remedy("use_tier", value="dram"),), " Use --tier dram."),
        ((Remedy("set_option", "peer.gpus", "[1]"),), " Set --tier-config 'peer.gpus' to [1]."),
        ((Remedy("set_option", "peer.gpus"),), " Set --tier-config 'peer.gpus' to another value."),
        ((Remedy("leave_out", "peer.copy_on"),), " Leave 'peer.copy_on' out of --tier-config."),
        ((Remedy("install", value="pip install it"),), " Run pip install it."),
        ((Remedy("start_service", value="`sglang-xmem mtierd`"),), " Start `sglang-xmem mtierd`."),
        ((Remedy("set_variable", "LIB", "its path"),), " Set LIB to its path."),
        ((Remedy("set_variable", "LIB"),), " Unset LIB."),
        ((Remedy("do", value="free memory"), LOWER_SIZE), " Free memory, or lower --cache-gb."),
        ((Remedy("do", value="a"), Remedy("do", value="b"), LOWER_SIZE), " A, b, or lower --cache-gb."),
    ],
)
def test_remedies_are_worded_with_the_engines_flags(remedies: tuple[Remedy, ...], fix: str) -> None:
    assert sentence(Unavailable("it is full", *remedies), FLAGS) == f"It is full.{fix}"


def test_a_setting_names_its_option() -> None:
    error = SettingError("dram.threads", "is 1025", "give 1 to 1024")
    assert sentence(error, FLAGS) == "--tier-config 'dram.threads' is 1025. Give 1 to 1024."
    assert str(error) == "--hicache-xmem-config 'dram.threads' is 1025. Give 1 to 1024."


def test_names_keep_their_case() -> None:
    assert sentence(Unavailable("/dev/dax0.0 is in use")) == "/dev/dax0.0 is in use."
    assert sentence(ValueError("as it is")) == "as it is"


@pytest.mark.parametrize("error", [Unavailable("full", LOWER_SIZE), SettingError("a.b", "is 1", "give 2")])
def test_errors_go_between_processes(error: Exception) -> None:
    there = pickle.loads(pickle.dumps(error))
    assert type(there) is type(error)
    assert str(there) == str(error)
