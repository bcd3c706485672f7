"""The contract of a memory tier: a file here applies it to one tier, with a stand-in for its hardware."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from sglang_xmem.errors import Unavailable, sentence
from sglang_xmem.tiers import MemoryTier, Ranks, Region, tier_classes

MIB = 1 << 20


def _write(address: int, content: bytes) -> None:
    ctypes.memmove(address, content, len(content))


@dataclass
class Case:
    """A tier on a machine of the test's.

    Attributes:
        tier: for one rank; has 16 MiB at least.
        check_untouched: asserts that the machine is as it was: nothing is held, mapped or pinned.
        write, read: how bytes get into and out of the regions. None: they cannot, for there is no such hardware.
        covers: whether memory is behind a range of addresses then.
        counts: what is allocated is missing from the capacity; a tier that says what others leave may not know.
        slack: bytes by which a capacity may be off, where a driver keeps some of what it gave.
        fail: makes the acquiring call of a number, counted from 0, fail in every later allocation; None: none does.
        calls: acquiring calls of an allocation of 4 MiB.
        settings: to plan with.
        gpu: of the rank.
    """

    tier: MemoryTier
    check_untouched: Callable[[], None] = lambda: None
    write: Callable[[int, bytes], object] | None = _write
    read: Callable[[int, int], bytes] = ctypes.string_at
    covers: Callable[[int, int], bool] = field(default=lambda address, nbytes: False)
    counts: bool = True
    slack: int = 0
    fail: Callable[[int | None], None] | None = None
    calls: int = 0


def pattern(number: int, nbytes: int) -> bytes:
    """Bytes that differ between regions and within one."""
    once = bytes((number * 37 + at * 13) % 251 for at in range(4099))
    return (once * (nbytes // len(once) + 1))[:nbytes]


class TierContract:
    """What `sglang_xmem.tiers.base.MemoryTier` promises. A subclass has a fixture `case`."""

    @pytest.fixture
    def case(self) -> Iterator[Case]:
        raise NotImplementedError

    @staticmethod
    @contextlib.contextmanager
    def regions(case: Case, *wanted: tuple[int, int]) -> Iterator[list[Region]]:
        """Regions of (bytes, granule), and an untouched machine behind them."""
        with contextlib.ExitStack() as undo:
            made = []
            for nbytes, granule in wanted:
                made.append(case.tier.allocate(nbytes, granule))
                undo.callback(made[-1].release)
            yield made
        case.check_untouched()

    # ---- shape ----

    @pytest.mark.parametrize(
        ("nbytes", "granule"),
        [
            (1, 1),
            (4096, 1),
            (3 * MIB + 17, 1),
            (MIB, 4096),
            (MIB + 1, 4096),
            (1, MIB),
            (5_000_000, 6144 * 7),
            (MIB, MIB),
        ],
    )
    def test_granules_are_whole_and_enough(self, case: Case, nbytes: int, granule: int) -> None:
        with self.regions(case, (nbytes, granule)) as (region,):
            assert region.granule == granule
            assert all(extent.nbytes >= granule for extent in region.extents)
            granules = sum(extent.nbytes // granule for extent in region.extents)
            assert granules * granule >= nbytes
            assert region.nbytes == granules * granule
            assert region.summary
            assert "\n" not in region.summary

    def test_extents_are_apart(self, case: Case) -> None:
        with self.regions(case, *[(MIB, 4096)] * 3) as regions:
            spans = sorted((e.address, e.address + e.nbytes) for region in regions for e in region.extents)
            assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))

    def test_all_bytes_are_there_and_nobody_elses(self, case: Case) -> None:
        """Every region is filled to its last byte, and then each still holds its own."""
        with self.regions(case, (MIB, 4096), (MIB + 5, 1), (100_000, 1000), (1, 1)) as regions:
            extents = [extent for region in regions for extent in region.extents]
            if case.write is None:
                assert all(case.covers(*extent) for extent in extents)
                return
            for number, (address, nbytes) in enumerate(extents):
                case.write(address, pattern(number, nbytes))
            for number, (address, nbytes) in enumerate(extents):
                assert case.read(address, nbytes) == pattern(number, nbytes)

    def test_an_owner_is_a_buffer_over_its_extent(self, case: Case) -> None:
        with self.regions(case, (MIB + 3, 1000)) as (region,):
            if region.owner is None:
                return
            assert case.tier.traits.cpu_addressable
            assert len(region.owner) == len(region.extents)
            for owner, extent in zip(region.owner, region.extents, strict=True):
                with memoryview(owner) as view:
                    assert view.nbytes >= extent.nbytes
                assert ctypes.addressof(ctypes.c_uint8.from_buffer(owner)) == extent.address
            del owner

    def test_traits_are_facts_that_fit_together(self, case: Case) -> None:
        traits = case.tier.traits
        assert traits.link in ("nvlink", "pcie", "cxl", "none")
        assert traits.cpu_addressable or not traits.counts_as_host_ram
        assert (traits.link == "none") == (case.tier.gpu is None)
        assert tier_classes()[case.tier.name] is type(case.tier)

    def test_a_rank_plan_goes_to_its_process(self, case: Case) -> None:
        assert pickle.loads(pickle.dumps(case.tier.rank_plan)) == case.tier.rank_plan

    def test_health(self, case: Case) -> None:
        assert case.tier.health().ok

    # ---- capacity ----

    def test_capacity_falls_with_every_allocation_and_comes_back(self, case: Case) -> None:
        before = case.tier.capacity_bytes()
        assert before >= 16 * MIB
        with self.regions(case, (MIB, 1)) as (first,):
            after = case.tier.capacity_bytes()
            assert after <= before - (first.nbytes if case.counts else 0) + case.slack
            with self.regions_beside(case, (MIB, 1)) as (second,):
                assert case.tier.capacity_bytes() <= after - (second.nbytes if case.counts else 0) + case.slack
            assert abs(case.tier.capacity_bytes() - after) <= case.slack
        assert abs(case.tier.capacity_bytes() - before) <= case.slack

    @staticmethod
    @contextlib.contextmanager
    def regions_beside(case: Case, *wanted: tuple[int, int]) -> Iterator[list[Region]]:
        """As `regions`, while others are there."""
        made = [case.tier.allocate(nbytes, granule) for nbytes, granule in wanted]
        yield made
        for region in made:
            region.release()

    def test_all_of_the_capacity_can_be_had_and_no_more(self, case: Case) -> None:
        if not case.counts:
            pytest.skip("its capacity is what others leave")
        most = case.tier.capacity_bytes()
        with self.regions(case, (most, 1)) as (region,):
            assert region.nbytes >= most
        with pytest.raises(Unavailable):
            case.tier.allocate(2 * most + 64 * MIB)
        case.check_untouched()

    @pytest.mark.parametrize(("granule", "share"), [(1, 0.5), (4096, 0.03), (700_000, 0.9)])
    def test_an_automatic_size_fits(self, case: Case, granule: int, share: float) -> None:
        """Two spaces of all the capacity, less what each may waste."""
        if not case.counts:
            pytest.skip("its capacity is what others leave")
        size = case.tier.capacity_bytes() - 2 * case.tier.waste_bytes(granule)
        first = int(size * share) // granule * granule
        second = (size - first) // granule * granule
        case.tier.expect(first + second)
        with self.regions(case, *[(nbytes, granule) for nbytes in (first, second) if nbytes]):
            pass

    # ---- refusals ----

    @pytest.mark.parametrize(
        ("nbytes", "granule"),
        [(0, 1), (-1, 1), (1, 0), (1, -1), (1 << 55, 1), (1 << 63, 1), (1, 1 << 63), (1 << 80, 9)],
    )
    def test_sizes_that_nothing_has_are_one_sentence(self, case: Case, nbytes: int, granule: int) -> None:
        before = case.tier.capacity_bytes()
        with pytest.raises(Unavailable) as caught:
            case.tier.allocate(nbytes, granule)
        words = sentence(caught.value)
        assert "\n" not in words
        assert len(words) < 500
        assert words.endswith(".")
        case.check_untouched()
        assert abs(case.tier.capacity_bytes() - before) <= case.slack

    def test_a_failure_at_any_call_leaves_nothing(self, case: Case) -> None:
        if case.fail is None:
            pytest.skip("nothing here can be made to fail")
        for number in range(case.calls):
            case.fail(number)
            with pytest.raises(Unavailable) as caught:
                case.tier.allocate(4 * MIB, MIB)
            assert "\n" not in str(caught.value)
            case.check_untouched()
        case.fail(None)
        with self.regions(case, (4 * MIB, MIB)):
            pass

    # ---- release ----

    def test_release_is_idempotent_and_frees_its_own_alone(self, case: Case) -> None:
        first, second = case.tier.allocate(MIB), case.tier.allocate(MIB, 4096)
        address, nbytes = second.extents[0]
        if case.write is not None:
            case.write(address, b"\5" * nbytes)
        for _ in range(3):
            first.release()
        if case.write is not None:
            assert case.read(address, nbytes) == b"\5" * nbytes
        else:
            assert case.covers(address, nbytes)
        assert first.owner is None
        second.release()
        second.release()
        case.check_untouched()

    def test_a_release_that_fails_is_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        def fail() -> None:
            raise RuntimeError("it is gone")

        Region([], "a test", fail).release()
        assert "releasing a test failed" in caplog.text


def planned(tier: type[MemoryTier], settings: Any, gpu: int | None) -> MemoryTier:
    """A tier as a rank of its own has it."""
    (plan,) = tier.plan_ranks(settings, Ranks(gpus=(gpu,)))
    return tier(settings, plan, gpu)
