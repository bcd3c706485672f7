"""The contract of a page copier, checked byte by byte against a plain loop. An implementation's test file subclasses
`CopierContract`.

A scene is made from a seed: several index spaces with slabs of frames and planes of any unit sizes, strides and
divisors, and a sequence of loads and stores between them. After each move all memory of both sides is compared, so what
lies between frames and units, and all that was not asked for, is a guard.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch

from sglang_xmem.copies.base import PageCopier, Pages, Step
from sglang_xmem.copies.geometry import MAX_VECTORS, Plane, Slab

Bytes = npt.NDArray[np.uint8]
MakeCopier = Callable[[Sequence[Slab], torch.device], PageCopier]

#: Bytes of a unit; those of a scene are among those that its alignment divides.
UNIT_BYTES = (1, 2, 3, 7, 8, 16, 24, 48, 64, 132, 656, 1152, 1664, 1744, 2048, 4096, 4112, 8448, 16400, 49152, 73728)
LARGE_UNIT_BYTES = 2 << 20
DIVISORS = (1, 2, 16, 48, 64, 256)
#: Slots are tested up to this many bits.
FAR = 2**50  # fills the gaps of a strided slot vector, which must not be read


@dataclass(frozen=True)
class Limits:
    """How large a scene may get, for implementations that are slow."""

    units: int = 4 << 20  # bytes of all units of one page of each vector, about
    pages: int = 40
    large: bool = True  # whether a unit may have LARGE_UNIT_BYTES


@dataclass
class Space:
    """One index space: its frames, and its planes' places."""

    slabs: list[Slab]
    frame_bytes: int
    planes: list[Plane]
    units: int  # pages that the device has

    def frames(self) -> list[int]:
        """Addresses of all frames."""
        return [slab.address + number * slab.frame_bytes for slab in self.slabs for number in range(slab.frames)]


class Scene:
    """Memory of both sides, a copier and its program; what the memory should hold, on the CPU.

    Args:
        make: makes the copier.
        seed: of everything.
        tier, device: where the two sides' memory is; `pinned` for host memory that a GPU reaches.
    """

    def __init__(
        self,
        make: MakeCopier,
        seed: int,
        limits: Limits,
        tier: str = "cpu",
        device: str = "cpu",
    ) -> None:
        self.random = random.Random(seed)
        choose = self.random
        self.device = torch.device(device)
        self.alignment = choose.choice((1, 2, 4, 8, 16, 16, 16))
        self.tier_size = self.device_size = self.alignment
        sizes = [nbytes for nbytes in UNIT_BYTES if nbytes % self.alignment == 0]
        shapes: list[tuple[int, list[tuple[int, int, int, int]], list[tuple[int, int]], int, int]] = []
        left = limits.units
        for _ in range(choose.randint(1, 4)):
            # Pages enough for two vectors of one move, and some that stay out of it.
            units = 2 * choose.randint(1, limits.pages) + 3
            divisor, planes, end = choose.choice(DIVISORS), [], 0
            for _ in range(choose.choice((0, 1, 2, 3, 6, 40))):
                unit = choose.choice(sizes)
                if limits.large and choose.random() < 0.02:
                    unit = LARGE_UNIT_BYTES
                if unit * units > left:
                    unit = sizes[0]
                left -= unit * units
                end += self._gap()
                stride = unit + self._gap()
                self.device_size += self._gap()
                planes.append((self.device_size, stride, end, unit))
                self.device_size += (units - 1) * stride + unit
                end += unit
            frame = end + self._gap() or self.alignment
            slabs = []
            for _ in range(choose.randint(1, 3)):
                self.tier_size += self._gap()
                slabs.append((self.tier_size, -(-units // choose.randint(1, 3))))
                self.tier_size += slabs[-1][1] * frame
            while sum(count for _, count in slabs) < units:
                self.tier_size += self._gap()
                slabs.append((self.tier_size, units))
                self.tier_size += units * frame
            shapes.append((frame, planes, slabs, units, divisor))
        self.tier_size += 64
        self.device_size += 64
        self.tier_memory, self.device_memory = memory(self.tier_size, tier), memory(self.device_size, device)
        there, here = self.tier_memory.data_ptr(), self.device_memory.data_ptr()
        self.spaces = [
            Space(
                [Slab(there + begin, count, frame) for begin, count in slabs],
                frame,
                [Plane(here + begin, stride, units, offset, unit, divisor) for begin, stride, offset, unit in planes],
                units,
            )
            for frame, planes, slabs, units, divisor in shapes
        ]
        #: The space of each vector; one may occur twice.
        self.vectors = list(range(len(self.spaces)))
        self.vectors += [number for number in range(len(self.spaces)) if choose.random() < 0.3]
        choose.shuffle(self.vectors)
        self.num_parts = choose.randint(1, 12)
        steps = [
            Step(plane, vector, choose.randrange(self.num_parts))
            for vector, space in enumerate(self.vectors)
            for plane in self.spaces[space].planes
        ]
        choose.shuffle(steps)
        self.steps = sorted(steps, key=lambda step: step.part)
        self.copier = make([slab for space in self.spaces for slab in space.slabs], self.device)
        self.program = self.copier.compile(self.steps, self.num_parts)
        self.expected_tier = self._random_bytes(self.tier_size)
        self.expected_device = self._random_bytes(self.device_size)
        self.tier_memory.copy_(torch.from_numpy(self.expected_tier))
        self.device_memory.copy_(torch.from_numpy(self.expected_device))
        self._keep: list[torch.Tensor] = []

    def _gap(self) -> int:
        return self.random.choice((0, 0, 1, 2, 7)) * self.alignment

    def _random_bytes(self, count: int) -> Bytes:
        return np.frombuffer(self.random.randbytes(count), dtype=np.uint8).copy()

    def pages(self) -> tuple[list[Pages], list[tuple[list[int], list[int]]]]:
        """Random pages of each vector, as the copier is given them, and as frames' addresses and units."""
        given, plain = [], []
        shuffled = {}
        for number, space in enumerate(self.spaces):
            frames, units = space.frames(), list(range(space.units))
            self.random.shuffle(frames)
            self.random.shuffle(units)
            shuffled[number] = (frames, units)
        for number in self.vectors:
            space, (frames, units) = self.spaces[number], shuffled[number]
            most = (space.units - 3) // 2
            count = self.random.choice((0, 1, most, self.random.randint(0, most)))
            mine = [frames.pop() for _ in range(count)], [units.pop() for _ in range(count)]
            divisor = space.planes[0].divisor if space.planes else 1
            stride = self.random.choice((1, 1, 2, 3, divisor))
            table = torch.full((count * stride,), FAR, dtype=torch.int64)
            table[::stride] = torch.tensor(
                [unit * divisor + self.random.randrange(divisor) for unit in mine[1]], dtype=torch.int64
            )
            slots = table.to(self.device)[::stride]
            given.append(Pages(torch.tensor(mine[0], dtype=torch.int64, device=self.device), slots))
            plain.append(mine)
        return given, plain

    def expect(self, plain: Sequence[tuple[list[int], list[int]]], *, load: bool) -> None:
        """What the contract says of a move, as a loop over planes and pages."""
        there, here = self.tier_memory.data_ptr(), self.device_memory.data_ptr()
        for plane, vector, _ in self.steps:
            for frame, unit in zip(*plain[vector], strict=True):
                tier = slice(frame + plane.offset - there, frame + plane.offset - there + plane.unit_bytes)
                begin = plane.device_address + unit * plane.device_stride - here
                device = slice(begin, begin + plane.unit_bytes)
                if load:
                    self.expected_device[device] = self.expected_tier[tier]
                else:
                    self.expected_tier[tier] = self.expected_device[device]

    def check(self, what: str) -> None:
        """All memory is as expected, to the last byte."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for side, found, expected in (
            ("tier", self.tier_memory, self.expected_tier),
            ("device", self.device_memory, self.expected_device),
        ):
            wrong = np.nonzero(found.cpu().numpy() != expected)[0]
            assert not len(wrong), f"{len(wrong)} bytes of the {side}, from {wrong[0]} on, after {what}"

    def run(self, moves: int = 4) -> None:
        """Loads and stores in random order, checked after each."""
        self.check("nothing")
        for number in range(moves):
            load = self.random.random() < 0.5
            given, plain = self.pages()
            self.expect(plain, load=load)
            if load:
                addresses = [np.array(frames, dtype=np.int64) for frames, _ in plain]
                self.copier.load(self.program, given, addresses=addresses)
            else:
                self.copier.store(self.program, given)
            self.check(f"move {number}, a {'load' if load else 'store'}, by {self.copier.describe()}")


def memory(nbytes: int, where: str) -> torch.Tensor:
    """Memory of either side, aligned to 16 bytes at least."""
    if where == "pinned":
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    return torch.empty(nbytes, dtype=torch.uint8, device=where)


class CopierContract(ABC):
    """The tests. A subclass says how its copiers are made and where their memory is."""

    seeds = range(40)
    limits = Limits()
    tier = "cpu"
    device = "cpu"

    @abstractmethod
    def make(self, slabs: Sequence[Slab], device: torch.device) -> PageCopier:
        """A copier with any settings; a subclass may vary them from call to call."""

    def scene(self, seed: int) -> Scene:
        return Scene(self.make, seed, self.limits, self.tier, self.device)

    def test_moves_exactly_the_named_pages(self) -> None:
        for seed in self.seeds:
            try:
                self.scene(seed).run()
            except Exception as error:
                raise AssertionError(f"scene {seed}: {error}") from error

    def test_slots_may_be_far(self) -> None:
        """Numbers of tokens take up to 40 bits, and a divisor that is no power of two does not round them."""
        units, divisor = 3, (1 << 24) - 3
        tier, device = memory(64, self.tier), memory(16 * units, self.device)
        far = (1 << 40) // divisor - 1
        # Unit 0 is so far below that the tested units are in memory. Unit 0 itself is never read.
        base = device.data_ptr() - 16 * (far - units + 1)
        plane = Plane(base, 16, far + 1, 0, 16, divisor)
        if base <= 0 or self.reads_all_units:
            pytest.skip("this copier looks at the whole array, of which there is no such large one")
        copier = self.make([Slab(tier.data_ptr(), 3, 16)], torch.device(self.device))
        program = copier.compile([Step(plane, 0, 0)], 1)
        tier.copy_(torch.arange(64, dtype=torch.uint8))
        device.fill_(0xA5)
        slots = [(far - 2) * divisor + divisor - 1, (far - 1) * divisor, far * divisor + divisor - 1]
        frames = [tier.data_ptr() + 16 * number for number in range(3)]
        on = {"dtype": torch.int64, "device": self.device}
        copier.load(program, [Pages(torch.tensor(frames, **on), torch.tensor(slots, **on))])  # type: ignore[arg-type]
        assert torch.equal(device.cpu(), torch.arange(48, dtype=torch.uint8))

    #: Whether the copier looks at units of a plane that it does not move.
    reads_all_units = False

    def one(self) -> tuple[PageCopier, list[Step], Plane]:
        """A small copier, and steps for it."""
        self.memory = memory(4096, self.tier), memory(4096, self.device)
        tier, device = (side.data_ptr() for side in self.memory)
        plane = Plane(device, 64, 8, 0, 64, 1)
        return self.make([Slab(tier, 8, 128)], torch.device(self.device)), [Step(plane, 0, 0)], plane

    def test_steps_that_make_no_sense_are_refused(self) -> None:
        copier, _, plane = self.one()
        wrong = {
            "unit_bytes": plane._replace(unit_bytes=0),
            "device_stride": plane._replace(device_stride=63),
            "device_units": plane._replace(device_units=0),
            "device_address": plane._replace(device_address=0),
            "divisor": plane._replace(divisor=0),
            "offset": plane._replace(offset=65),
        }
        for name, broken in wrong.items():
            with pytest.raises(ValueError, match=name):
                copier.compile([Step(broken, 0, 0)], 1)
        for name, steps in {
            "vector": [Step(plane, MAX_VECTORS, 0)],
            "not in order": [Step(plane, 0, 1), Step(plane, 0, 0)],
            "not below 2": [Step(plane, 0, 2)],
        }.items():
            with pytest.raises(ValueError, match=name):
                copier.compile(steps, 2)

    def test_pages_are_checked(self) -> None:
        copier, steps, _ = self.one()
        program = copier.compile(steps, 1)
        some = torch.zeros(3, dtype=torch.int64, device=self.device)
        for match, frames, slots in (
            ("int64", some.int(), some),
            ("int64", some, some[None]),
            ("int64", some, some.to("meta")),
            ("3 frames but 2 slots", some, some[:2]),
            ("contiguous", torch.stack([some, some], 1)[:, 0], some),
        ):
            with pytest.raises(ValueError, match=match):
                copier.load(program, [Pages(frames, slots)])
        with pytest.raises(ValueError, match="0 vectors of pages for a program with 1"):
            copier.store(program, [])
        with pytest.raises(ValueError, match="only the copier that compiled a program"):
            self.one()[0].load(program, [Pages(some, some)])

    def test_nothing_to_do_is_done(self) -> None:
        copier, steps, _ = self.one()
        none = torch.zeros(0, dtype=torch.int64, device=self.device)
        for given in (steps, []):
            program = copier.compile(given, 3)
            copier.load(program, [Pages(none, none)])
            copier.store(program, [Pages(none, none)])
