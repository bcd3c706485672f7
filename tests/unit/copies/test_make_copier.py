"""Which copier a name and a policy give, and the settings of each, without a GPU."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from sglang_xmem import copies
from sglang_xmem.copies import CopierName, CopyPolicy, make_copier, make_program
from sglang_xmem.copies.geometry import Plane, Slab
from sglang_xmem.copies.tuning import (
    DEFAULT_TUNING,
    SMALL_UNIT_TUNING,
    CudaTuning,
    default_tuning,
    fit_tuning,
    path_of,
)
from sglang_xmem.errors import CopyError

SLABS = [Slab(0x1000, 4, 64)]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def make(name: Any = "auto", device: torch.device = CPU, **more: Any) -> tuple[Any, CopyError | None]:
    return make_copier(name, SLABS, device, **{"link": "none", **more})


def test_auto_is_torch_on_the_cpu() -> None:
    copier, reason = make()
    assert copier.name == copier.describe() == "torch"
    assert reason is None


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'nccl'.*auto, cuda, triton, torch"):
        make(cast(CopierName, "nccl"))


@pytest.mark.parametrize(("name", "device"), [("torch", torch.device("meta")), ("cuda", CPU)])
def test_a_device_that_the_copier_is_not_for(name: str, device: torch.device) -> None:
    with pytest.raises(ValueError, match=f"{name!r} is for pools on"):
        make(name, device)


@pytest.mark.parametrize("slabs", [[], [Slab(0, 1, 1)], [Slab(4096, 0, 1)], [Slab(4096, 1, 0)]])
def test_slabs_have_frames(slabs: list[Slab]) -> None:
    with pytest.raises(ValueError, match="slab"):
        make_copier("torch", slabs, CPU, link="none")


@pytest.mark.parametrize(
    ("name", "settings", "named"),
    [
        ("torch", {"load": {"variant": "bulk"}}, "no copy.load.variant; leave it out"),
        ("auto", {"store": {"ctas": 4}}, "no copy.store.ctas; leave it out"),
        ("triton", {"load": {"ctas": 4, "unroll": 2}}, "no copy.load.unroll; leave it out"),
        (
            "triton",
            {"load": {"stages": 2}, "store": {"threads": 64}},
            "no copy.load.stages and no copy.store.threads; leave them out",
        ),
    ],
)
def test_settings_of_another_kernel_are_refused(name: str, settings: Any, named: str) -> None:
    with pytest.raises(CopyError, match=f"{named}, or set copy.kernel to cuda"):
        make(name, **settings)


def test_triton_has_ctas() -> None:
    pytest.importorskip("triton")
    copier, _ = make("triton", load={"ctas": 5}, store={"ctas": 7})
    assert (copier.load_ctas, copier.store_ctas) == (5, 7)
    with pytest.raises(ValueError, match="at least 1"):
        make("triton", load={"ctas": 0})


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_only_the_cuda_kernel_runs_elsewhere(name: str) -> None:
    with pytest.raises(CopyError, match=r"set copy\.kernel to cuda, or leave out dram\.relays\.$"):
        make(name, policy=CopyPolicy(relays=(1,)))
    with pytest.raises(CopyError, match=r"set copy\.kernel to cuda, or set peer\.copy_on to rank\.$"):
        make(name, policy=CopyPolicy(runner=1, required=True))
    copier, reason = make(name, policy=CopyPolicy(runner=1))
    assert copier.name == name
    assert "cannot run on another GPU" in str(reason)


class Cuda:
    """Stands in for the CUDA copier; some GPUs refuse when it is made, some when it compiles."""

    name = "cuda"
    refuses_to_run = 1
    refuses_to_compile = 2

    def __init__(self, slabs: Any, device: Any, *, link: str, load: Any, store: Any, runs_on: int | None) -> None:
        if runs_on == self.refuses_to_run:
            raise CopyError(f"GPU {runs_on} is old")
        self.link, self.load, self.store, self.runs_on = link, load, store, runs_on
        self.slabs, self.device = slabs, device

    def compile(self, steps: Any, num_parts: int) -> Any:
        if self.runs_on == self.refuses_to_compile:
            raise CopyError(f"GPU {self.runs_on} cannot reach memory")
        return "program"


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_xmem.copies import cuda

    monkeypatch.setattr(cuda, "CudaPageCopier", Cuda)


@pytest.mark.usefixtures("fake_cuda")
def test_the_rank_copies_where_another_gpu_cannot() -> None:
    copier, reason = make("auto", CUDA, policy=CopyPolicy(runner=3), load={"ctas": 4}, link="nvlink")
    assert (copier.runs_on, copier.load, copier.link, reason) == (3, {"ctas": 4}, "nvlink", None)
    copier, reason = make("auto", CUDA, policy=CopyPolicy(runner=1))
    assert copier.runs_on is None
    assert "GPU 1 is old" in str(reason)
    with pytest.raises(CopyError, match="GPU 1 is old"):
        make("auto", CUDA, policy=CopyPolicy(runner=1, required=True))


@pytest.mark.usefixtures("fake_cuda")
def test_the_rank_copies_where_another_gpu_cannot_reach_the_pools() -> None:
    arguments: Any = ("cuda", SLABS, CUDA, [], 1)
    copier, program, reason = make_program(*arguments, link="nvlink", policy=CopyPolicy(runner=3))
    assert (cast(Any, copier).runs_on, program, reason) == (3, "program", None)
    for gpu in (1, 2):
        copier, program, reason = make_program(*arguments, link="nvlink", policy=CopyPolicy(runner=gpu))
        assert (cast(Any, copier).runs_on, cast(Any, program)) == (None, "program")
        assert f"GPU {gpu}" in str(reason)
        with pytest.raises(CopyError, match=f"GPU {gpu}"):
            make_program(*arguments, link="nvlink", policy=CopyPolicy(runner=gpu, required=True))


@pytest.mark.usefixtures("fake_cuda")
def test_relays_share() -> None:
    copier, reason = make("cuda", CUDA, policy=CopyPolicy(relays=(4, 5)), link="pcie")
    assert copier.name == "shared"
    assert [one.runs_on for one in copier._copiers] == [None, 4, 5]
    assert reason is None
    with pytest.raises(CopyError, match="GPU 1"):
        make("cuda", CUDA, policy=CopyPolicy(relays=(4, 1)), link="pcie")


@pytest.mark.parametrize(
    "wrong",
    [
        {"variant": "tma"},
        {"ctas": 0},
        {"threads": 100},
        {"unroll": 0},
        {"stage_bytes": 1000},
        {"variant": "bulk", "stages": 2, "pending_stores": 2},
        {"variant": "bulk", "stages": 15, "stage_bytes": 16384},
        {"rings": 0},
        {"stages": 0},
        {"stages": 33},
        {"pending_stores": -1},
    ],
)
def test_tuning_out_of_range_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)) if len(wrong) == 1 else r"pending_stores|shared memory"):
        CudaTuning(**wrong)  # type: ignore[arg-type]


def test_what_only_bulk_copies_need_is_theirs() -> None:
    """A change of a few settings is checked against each default, some of which are of the other variant."""
    assert CudaTuning(stages=2, pending_stores=2).variant == "register"
    assert CudaTuning(stages=15).shared_bytes == 0


def test_bulk_gives_way_to_register_where_it_cannot_run() -> None:
    bulk = CudaTuning(variant="bulk", ctas=7)
    hopper = {"capability": (9, 0), "max_shared_bytes": 227 * 1024, "alignment": 16}
    assert fit_tuning(bulk, **hopper) is bulk  # type: ignore[arg-type]
    for other in ({"capability": (8, 9)}, {"max_shared_bytes": 99 * 1024}, {"alignment": 8}):
        fitted = fit_tuning(bulk, **{**hopper, **other})  # type: ignore[arg-type]
        assert (fitted.variant, fitted.ctas) == ("register", 7)


@pytest.mark.parametrize(
    ("unit_bytes", "pieces", "piece"),
    [(16, 1, 16), (4096, 1, 4096), (4112, 2, 2176), (65536, 16, 4096), (8448, 3, 2816), (2 << 20, 512, 4096)],
)
def test_units_are_cut_to_stages(unit_bytes: int, pieces: int, piece: int) -> None:
    bulk = CudaTuning(variant="bulk", stage_bytes=4096)
    assert bulk.pieces(unit_bytes, 16) == (pieces, piece)
    assert (pieces - 1) * piece < unit_bytes <= pieces * piece
    assert CudaTuning().pieces(unit_bytes, 16) == (unit_bytes // 16, 16)


def test_a_link_or_another_gpu_picks_the_settings() -> None:
    assert path_of("nvlink", None) == path_of("none", None) == "nvlink"
    assert path_of("nvlink", 1) == "runner"
    assert path_of("pcie", None) == path_of("pcie", 1) == path_of("cxl", None) == "pcie", "a relay's link is no faster"


def test_small_units_have_settings_of_their_own() -> None:
    """Where they make up most of a page of some space; a peer that copies takes all blocks anyway."""
    kv, states, mla = [1024] * 24, [2 << 20] * 36, [1152] * 61
    for direction in ("load", "store"):
        for path in ("nvlink", "pcie"):
            small, large = SMALL_UNIT_TUNING[direction, path], DEFAULT_TUNING[direction, path]
            assert default_tuning(direction, path, [[1000] * 8]) == small
            assert default_tuning(direction, path, [[65536] * 8]) == large
            assert default_tuning(direction, path, [[65536] * 8 + [160] * 8]) == large, "most bytes are in large units"
            assert default_tuning(direction, path, [[65536] * 8], alignment=8) == small, "bulk copies cannot run"
            assert default_tuning(direction, path, []) == default_tuning(direction, path, [[]]) == large
        assert default_tuning(direction, "nvlink", [kv, states]) == SMALL_UNIT_TUNING[direction, "nvlink"]
        assert default_tuning(direction, "nvlink", [mla]) == SMALL_UNIT_TUNING[direction, "nvlink"]
        assert default_tuning(direction, "pcie", [mla]) == DEFAULT_TUNING[direction, "pcie"]
        assert default_tuning(direction, "runner", [mla]) == DEFAULT_TUNING[direction, "runner"]


def test_the_rank_gives_few_blocks_to_copies() -> None:
    for table in (DEFAULT_TUNING, SMALL_UNIT_TUNING):
        assert all(tuning.ctas <= 32 for (_, path), tuning in table.items() if path != "runner")


def test_importing_what_needs_no_torch() -> None:
    """The command line, doctor and mtierd run without it."""
    import subprocess
    import sys

    names = ("copies", "copies.geometry", "copies.policy", "copies.tuning", "copies.table")
    script = (
        "import sys\n"
        + "\n".join(f"import sglang_xmem.{name}" for name in names)
        + "\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert Plane(1, 2, 3, 0, 2, 1).device_bytes == 6
    assert copies.CopyPolicy() == (None, False, ())
