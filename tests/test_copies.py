"""Page copiers on the CPU, byte by byte against a plain loop. The Triton kernel runs in Triton's interpreter.

Run as a script, this file checks the Triton copier; the interpreter is chosen by an environment variable before the
first import of Triton, so it gets a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang_xmem.copies import CopierName, PageCopier, make_copier
from sglang_xmem.copies.torch import TorchPageCopier
from sglang_xmem.copies.tuning import DEFAULT_TUNING, SMALL_PAGE_TUNING, CudaTuning, default_tuning, fit_tuning

POISON = 0xA5
ROW_BYTES = (1, 16, 24, 64, 72, 80, 144, 256, 656, 1024, 1152)
PAGE_SIZES = (1, 2, 16, 64, 256)

Planes = list[torch.Tensor]
MakeCopier = Callable[[Planes, Planes, int], PageCopier]


@dataclass(frozen=True)
class Case:
    """One call: sizes, the planes it names, and how the index tensors are strided."""

    row_bytes: int
    page_size: int
    num_pages: int
    num_planes: int
    planes: range
    tier_stride: int
    device_stride: int
    load: bool
    seed: int

    def page_rows(self, num_pages: int, stride: int, generator: torch.Generator) -> torch.Tensor:
        """First rows of different pages in random order, int64, as a view of the given element stride."""
        rows = torch.randperm(num_pages, generator=generator)[: self.num_pages] * self.page_size
        # What lies between the elements of the view would be far out of range as a row.
        table = torch.full((max(len(rows) * stride, 1),), 2**50, dtype=torch.int64)
        view = table[: len(rows) * stride : stride]
        view.copy_(rows)
        return view


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_planes = draw(st.integers(1, 6))
    first = draw(st.integers(0, num_planes - 1))
    page_size = draw(st.sampled_from(PAGE_SIZES))
    return Case(
        row_bytes=draw(st.sampled_from(ROW_BYTES)),
        page_size=page_size,
        num_pages=draw(st.integers(0, 40 if page_size <= 16 else 6)),
        num_planes=num_planes,
        planes=range(first, draw(st.integers(first, num_planes))),
        tier_stride=draw(st.sampled_from((1, page_size, 3))),
        device_stride=draw(st.sampled_from((1, page_size, 2))),
        load=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


def expected_planes(case: Case, sources: Planes, before: Planes, src_rows: list[int], dst_rows: list[int]) -> Planes:
    """What the contract says, as a loop over pages: destination planes after the copy."""
    after = [plane.clone() for plane in before]
    for plane in case.planes:
        for src, dst in zip(src_rows, dst_rows, strict=True):
            for row in range(case.page_size):
                after[plane][dst + row] = sources[plane][src + row]
    return after


def check(case: Case, make: MakeCopier) -> None:
    """Run one case; every byte of both sides must be as the contract says, guard rows and other planes included.

    Raises:
        AssertionError: a byte differs.
    """
    generator = torch.Generator().manual_seed(case.seed)
    # Different numbers of pages, and rows behind the last page: those are the guard.
    tier_pages, device_pages = case.num_pages + 2, case.num_pages + 5

    def random_planes(num_pages: int) -> Planes:
        shape = (num_pages * case.page_size + 1, case.row_bytes)
        return [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for _ in range(case.num_planes)]

    def poisoned_planes(num_pages: int) -> Planes:
        shape = (num_pages * case.page_size + 1, case.row_bytes)
        return [torch.full(shape, POISON, dtype=torch.uint8) for _ in range(case.num_planes)]

    tier = (random_planes if case.load else poisoned_planes)(tier_pages)
    device = (poisoned_planes if case.load else random_planes)(device_pages)
    tier_rows = case.page_rows(tier_pages, case.tier_stride, generator)
    device_rows = case.page_rows(device_pages, case.device_stride, generator)

    source, destination = (tier, device) if case.load else (device, tier)
    src_rows, dst_rows = (tier_rows, device_rows) if case.load else (device_rows, tier_rows)
    untouched = [plane.clone() for plane in source]
    expected = expected_planes(case, source, destination, src_rows.tolist(), dst_rows.tolist())

    copier = make(tier, device, case.page_size)
    (copier.load if case.load else copier.store)(tier_rows, device_rows, case.planes)

    for plane in range(case.num_planes):
        assert torch.equal(destination[plane], expected[plane]), f"plane {plane} of {case}"
        assert torch.equal(source[plane], untouched[plane]), f"source plane {plane} of {case}"


def named(name: str) -> MakeCopier:
    return lambda tier, device, page_size: make_copier(cast(CopierName, name), tier, device, page_size)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_torch_copies_exactly_the_named_pages(case: Case) -> None:
    check(case, named("torch"))


def check_triton() -> None:
    """Property test of the Triton copier; needs TRITON_INTERPRET=1."""

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(cases())
    def run(case: Case) -> None:
        check(case, named("triton"))

    run()


def test_triton_copies_exactly_the_named_pages() -> None:
    pytest.importorskip("triton")
    answer = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr[-4000:]
    assert "triton copier checked" in answer.stdout


class _SwappedPlanes(TorchPageCopier):
    """Takes K for V and V for K."""

    def _copy(self, tier_rows: torch.Tensor, device_rows: torch.Tensor, planes: range, *, load: bool) -> None:
        self._tier_pages = self._tier_pages[::-1]
        super()._copy(tier_rows, device_rows, planes, load=load)


class _SwappedSides(TorchPageCopier):
    """Takes the tier's rows for the device's."""

    def _copy(self, tier_rows: torch.Tensor, device_rows: torch.Tensor, planes: range, *, load: bool) -> None:
        super()._copy(device_rows, tier_rows, planes, load=load)


class _OnePageShort(TorchPageCopier):
    """Forgets the last page."""

    def _copy(self, tier_rows: torch.Tensor, device_rows: torch.Tensor, planes: range, *, load: bool) -> None:
        super()._copy(tier_rows[:-1], device_rows[:-1], planes, load=load)


class _OnePlaneMore(TorchPageCopier):
    """Copies a plane that was not asked for."""

    def _copy(self, tier_rows: torch.Tensor, device_rows: torch.Tensor, planes: range, *, load: bool) -> None:
        super()._copy(tier_rows, device_rows, range(self.num_planes), load=load)


@pytest.mark.parametrize("load", [True, False])
@pytest.mark.parametrize("broken", [_SwappedPlanes, _SwappedSides, _OnePageShort, _OnePlaneMore])
def test_check_notices_a_broken_copier(broken: type[TorchPageCopier], load: bool) -> None:
    planes = range(1) if broken is _OnePlaneMore else range(2)
    case = Case(
        row_bytes=16,
        page_size=4,
        num_pages=9,
        num_planes=2,
        planes=planes,
        tier_stride=1,
        device_stride=1,
        load=load,
        seed=1,
    )
    check(case, TorchPageCopier)
    with pytest.raises((AssertionError, IndexError)):  # rows of the wrong side may not exist on this one
        check(case, broken)


def planes_of(num_planes: int, rows: int = 8, row_bytes: int = 16) -> Planes:
    return [torch.zeros((rows, row_bytes), dtype=torch.uint8) for _ in range(num_planes)]


@pytest.mark.parametrize(
    ("tier", "device", "page_size"),
    [
        ([], [], 1),
        (planes_of(2), planes_of(4), 1),
        (planes_of(2), planes_of(2, row_bytes=32), 1),
        (planes_of(2), planes_of(2), 0),
        (planes_of(2), [plane[:, :16] for plane in planes_of(2, row_bytes=32)], 1),
        (planes_of(2), [plane.view(torch.int16) for plane in planes_of(2, row_bytes=32)], 1),
    ],
    ids=["none", "number", "row_bytes", "page_size", "packing", "type"],
)
def test_planes_that_do_not_match_are_refused(tier: Planes, device: Planes, page_size: int) -> None:
    with pytest.raises(ValueError, match=r"plane|page_size"):
        make_copier("torch", tier, device, page_size)


def test_rows_and_planes_are_checked() -> None:
    copier = make_copier("torch", planes_of(2), planes_of(2), 1)
    rows = torch.arange(3)
    with pytest.raises(ValueError, match="int64"):
        copier.load(rows.int(), rows, range(2))
    with pytest.raises(ValueError, match="int64"):
        copier.load(rows, rows[None], range(2))
    with pytest.raises(ValueError, match="3 tier rows against 2"):
        copier.store(rows, rows[:2], range(2))
    for planes in (range(-1, 1), range(3), range(0, 2, 2)):
        with pytest.raises(ValueError, match="planes"):
            copier.load(rows, rows, planes)


def test_auto_is_torch_on_the_cpu() -> None:
    copier = make_copier("auto", planes_of(2), planes_of(2), 1)
    assert copier.name == "torch"
    assert copier.describe() == "torch"


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'nccl'.*auto, cuda, triton, torch"):
        make_copier(cast(CopierName, "nccl"), planes_of(2), planes_of(2), 1)


def test_torch_refuses_planes_elsewhere() -> None:
    elsewhere = [plane.to("meta") for plane in planes_of(2)]
    with pytest.raises(ValueError, match="meta"):
        make_copier("torch", planes_of(2), elsewhere, 1)


def test_cuda_refuses_planes_on_the_cpu() -> None:
    with pytest.raises(ValueError, match="CUDA"):
        make_copier("cuda", planes_of(2), planes_of(2), 1)


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
        {"pending_stores": -1},
    ],
)
def test_tuning_out_of_range_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)) if len(wrong) == 1 else r"pending_stores|shared memory"):
        CudaTuning(**wrong)  # type: ignore[arg-type]


def test_what_only_bulk_copies_need_is_theirs() -> None:
    """A change of a few settings is checked against each default, some of which are of the other variant."""
    assert CudaTuning(stages=2, pending_stores=2).variant == "register"
    assert CudaTuning(stages=15).dynamic_shared_bytes == 0


def test_bulk_gives_way_to_register_where_it_cannot_run() -> None:
    bulk = CudaTuning(variant="bulk", ctas=7)
    hopper = {"capability": (9, 0), "max_shared_bytes": 227 * 1024, "alignment": 16}
    assert fit_tuning(bulk, **hopper) is bulk  # type: ignore[arg-type]
    for other in ({"capability": (8, 9)}, {"max_shared_bytes": 99 * 1024}, {"alignment": 8}):
        fitted = fit_tuning(bulk, **{**hopper, **other})  # type: ignore[arg-type]
        assert (fitted.variant, fitted.ctas) == ("register", 7)


def test_tiles_cover_the_work() -> None:
    register = CudaTuning(unroll=8)
    assert register.tiles_per_plane(1, 64, 16) == 1
    assert register.tiles_per_plane(3, 65536, 16) == 48
    bulk = CudaTuning(variant="bulk", stage_bytes=16384)
    assert bulk.tiles_per_plane(17, 1024, 16) == 2
    assert bulk.tiles_per_plane(2, 65552, 16) == 10
    for table in (DEFAULT_TUNING, SMALL_PAGE_TUNING):
        assert all(tuning.ctas <= 32 for (_, where), tuning in table.items() if where != "copier")


def test_small_pages_have_settings_of_their_own() -> None:
    """Over NVLink by the rank alone: host links are slow enough, and a peer that copies takes all blocks."""
    for direction in ("load", "store"):
        small, large = (default_tuning(direction, "device", nbytes) for nbytes in (1024, 2048))
        assert (small.variant, large) == ("register", DEFAULT_TUNING[direction, "device"])
        for where in ("host", "copier"):
            assert default_tuning(direction, where, 1024) == DEFAULT_TUNING[direction, where]


if __name__ == "__main__":
    check_triton()
    print("triton copier checked")
