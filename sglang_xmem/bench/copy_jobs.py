"""What `sglang-xmem bench copy` measures: sizes, settings and targets. Nothing here touches a device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Row = dict[str, Any]

#: Where bytes go. `peer_both` loads and stores at once, `peer_matmul` loads beside a matrix product, `peer_enqueue` is
#: the time that a load takes of the calling thread.
PATHS = ("peer_load", "peer_store", "peer_both", "peer_matmul", "peer_enqueue", "host_load", "host_store")
CPU_PATHS = ("host_load", "host_store")
#: Peer memory: the tier's; the same without a context on the peer, which then rests; of cuMemAlloc in such a context.
#: `asleep` can only be measured before anything makes a context there.
MEMORIES = ("asleep", "tier", "context")
#: Host memory of which another GPU moves a share through its own link.
RELAYED = "relayed"
#: Which GPU runs copies.
RunsOn = Literal["rank", "peer"]
#: Which is to: the one that the tier takes by itself, the rank's own, or the peer and no other.
By = Literal["tier", "rank", "peer"]


@dataclass(frozen=True)
class Case:
    """Pages to copy: `planes` planes of `pages` pages of `page_bytes`, rows of `row_bytes`."""

    label: str
    page_bytes: int
    row_bytes: int
    pages: int
    planes: int

    @property
    def nbytes(self) -> int:
        return self.page_bytes * self.pages * self.planes

    def limited(self, nbytes: float, keep_planes: bool = False) -> Case:
        """The same with fewer planes, and then fewer pages, so that it copies at most about `nbytes`."""
        least = self.planes if keep_planes else min(2, self.planes)
        planes = self.planes if keep_planes else min(self.planes, int(nbytes // (self.page_bytes * self.pages)))
        planes = max(least, planes)
        pages = max(1, min(self.pages, int(nbytes // (self.page_bytes * planes))))
        return dataclasses.replace(self, planes=planes, pages=pages)


CASES = (
    Case("bf16 pages of 64 tokens", 65536, 1024, 1000, 96),
    Case("16 pages", 65536, 1024, 16, 48),
    Case("page size 1", 1024, 1024, 1_000_000, 4),
    Case("fp8 pages of 64 tokens", 32768, 512, 1000, 96),
    Case("MLA rows of 1152 B, pages of 64", 73728, 1152, 1000, 61),
    Case("MLA rows of 656 B, pages of 64", 41984, 656, 1000, 61),
)
MAIN, FEW, ROWS = 0, 1, 2  # what tells these cases apart from the rest below

#: Share of the contiguous copy that scattered pages are to reach, by case; with few thread blocks, over host links and
#: both ways at once. A matrix product may be slowed by so much, and an 80K-token load may take so long to enqueue.
TARGETS = {MAIN: 0.97, FEW: 0.97, ROWS: 0.85, 3: 0.94, 4: 0.94, 5: 0.94}
FEW_CTAS, FEW_CTAS_TARGET = 32, 0.94
HOST_TARGET = 0.98
BOTH_TARGET = 0.90
MATMUL_TARGET, MATMUL_LINK_SHARE = 0.05, 0.90
ENQUEUE_TARGET_US = 300.0
#: An 80K-token load in pages of 64, and the smaller ones that show that its time does not grow with tokens.
ENQUEUE_PAGES = (1, 160, 1280)

#: Neighbouring pages of loads that go through a staging ring: about 8K tokens, as much as SGLang prefills at once by
#: default, and about the fewest that the ring is used for.
RUNS_OF_PAGES = (125, 20)

#: Bytes that one copy takes at most, so that slow links and CPUs are done as soon as fast ones.
HOST_BYTES, CPU_BYTES = 1.6e9, 32e6
TUNE_BYTES = {"peer": 1.6e9, "host": 0.4e9}
QUICK_BYTES, QUICK_CPU_BYTES = 128e6, 4e6

Changes = Mapping[str, Any]


def register(ctas: int, threads: int, unroll: int) -> Changes:
    """The kernel's register variant, as changes to whatever the default is."""
    return {"variant": "register", "ctas": ctas, "threads": threads, "unroll": unroll}


def bulk(ctas: int, rings: int, stages: int, stage_bytes: int, pending_stores: int) -> Changes:
    """The same of the bulk variant."""
    return {
        "variant": "bulk",
        "ctas": ctas,
        "rings": rings,
        "stages": stages,
        "stage_bytes": stage_bytes,
        "pending_stores": pending_stores,
    }


def link_settings(path: str, case: int) -> Changes:
    """Settings for the link's sake alone: what filled it best in docs/results/copy.jsonl, however many blocks it takes.

    The tier's own settings leave most of the GPU to the forward pass, and are measured beside these.
    """
    tier, _, kind = path.partition("_")
    few = LINK_SETTINGS.get(f"{tier} {kind} of few pages") if case == FEW else None
    return few or LINK_SETTINGS[f"{tier} {kind}"]


LINK_SETTINGS: dict[str, Changes] = {
    "peer load": register(132, 256, 16),
    "peer store": bulk(132, 2, 3, 32768, 1),
    "peer store of few pages": register(132, 512, 8),
    "peer few blocks": bulk(32, 2, 3, 32768, 1),
    "peer both": register(64, 512, 16),  # two of these fit beside each other
    "host load": bulk(16, 8, 4, 4096, 1),
    "host store": bulk(16, 8, 4, 4096, 1),
}


#: Kernels of the rank's GPU that may run beside a forward pass, by what rows call them; each with ever more blocks,
#: until a load alone has 90 % of the link.
MATMUL_KERNELS: Mapping[str, Changes] = {"rank": {}, "register": register(8, 512, 16)}
MATMUL_CTAS = (8, 10, 12, 16, 24, 32, 64)

#: What --tune tries: kernels, times numbers of blocks.
TUNE_KERNELS: tuple[Changes, ...] = (
    register(1, 256, 16),
    register(1, 512, 8),
    register(1, 512, 16),
    register(1, 1024, 4),
    register(1, 1024, 8),
    bulk(1, 8, 4, 4096, 1),
    bulk(1, 4, 8, 4096, 2),
    bulk(1, 4, 6, 8192, 3),
    bulk(1, 1, 12, 16384, 6),
    bulk(1, 2, 3, 32768, 1),
)
TUNE_CTAS = {"peer": (8, 16, 32, 64, 132), "host": (2, 4, 8, 16)}
#: The same where the peer copies, which has nothing else to do.
TUNE_CTAS_BY_PEER = (16, 32, 64, 132)
#: Of settings that are this close to the fastest, --tune takes the one with the fewest blocks.
TUNE_TOLERANCE = 0.02


@dataclass(frozen=True)
class Job:
    """One measurement, of one row or two.

    Attributes:
        path, memory: members of PATHS and MEMORIES; host memory is `tier` or RELAYED.
        number: of the case in CASES.
        case: what is copied, cut to what fits.
        kernel: name of the copier, or `engine`: the copy engine, page by page, or `staged`: loads of the tier's copier
            with its staging ring.
        tuning: what its settings are called in rows: `shipped` is what the tier does by default, `rank` its settings
            for copies by the rank's GPU, `link` is for the link's sake alone, `in order` the same as `link`.
        changes: to the tier's own settings.
        target: see `reached`; None without one.
        by: which GPU runs the copies.
        in_order: pages follow each other on both sides, in place of scattered ones.
        run_pages: so many pages follow each other in the tier, then as many elsewhere.
    """

    path: str
    memory: str
    number: int
    case: Case
    kernel: str = "cuda"
    tuning: str = "shipped"
    changes: Changes = field(default_factory=dict)
    target: float | None = None
    by: By = "rank"
    in_order: bool = False
    run_pages: int = 1

    @property
    def tier(self) -> str:
        return self.path.partition("_")[0]

    @property
    def key(self) -> str:
        """Unique in a run."""
        settings = " ".join(f"{name}={value}" for name, value in self.changes.items())
        return "/".join([self.path, self.memory, self.case.label, self.kernel, self.tuning, self.by, settings])

    def __str__(self) -> str:
        return f"{self.path}, {self.case.label}, {self.tuning if self.kernel == 'cuda' else self.kernel}"


def target(path: str, number: int, ctas: int | None = None) -> float | None:
    """What a measurement is to reach; `ctas` where the blocks are limited."""
    if path.startswith("host"):
        return HOST_TARGET if number == MAIN else None
    if path.endswith("both"):
        return BOTH_TARGET
    if path.endswith("matmul"):
        return MATMUL_TARGET
    if path.endswith("enqueue"):
        return ENQUEUE_TARGET_US
    if number == MAIN and ctas is not None and ctas <= FEW_CTAS:
        return FEW_CTAS_TARGET
    return TARGETS[number]


def gpu_jobs(
    paths: Sequence[str],
    numbers: Sequence[int] | None,
    memories: Sequence[str] | None,
    quick: bool,
    copies_on: RunsOn | None = None,
) -> list[Job]:
    """The jobs of a run on a GPU with the settings that come with this package.

    Args:
        paths: members of PATHS.
        numbers: places in CASES; None is all over a peer, and over host links the first ones, for the time they take.
        memories: of peer memory; None measures all over the tier's, and the main case once over each other.
        quick: the least that still runs every path.
        copies_on: the GPU that runs a peer's copies; None is as the tier does, and by the rank beside it.
    """
    once = [] if memories is not None or (numbers is not None and MAIN not in numbers) else ["asleep", "context"]
    others = {
        memory: [
            _job(path, MAIN, memory, quick, "link", link_settings(path, MAIN))
            for path in ("peer_load", "peer_store")
            if path in paths
        ]
        for memory in once
    }
    jobs = others.get("asleep", [])  # first, for what follows wakes the peer
    jobs += [
        job
        for memory in sorted(memories or ("tier",), key=MEMORIES.index)
        for number in (range(len(CASES)) if numbers is None else numbers)
        for path in paths
        if path.startswith("peer")
        for job in _jobs_of(path, number, memory, quick)
    ]
    for number in range(ROWS + 1) if numbers is None else numbers:
        jobs += [job for path in paths if path.startswith("host") for job in _jobs_of(path, number, "tier", quick)]
    if numbers is None or MAIN in numbers:
        relayed = [path for path in paths if path.startswith("host")]
        jobs += [_job(path, MAIN, RELAYED, quick, "shipped", {}, targeted=False) for path in relayed]
    jobs += others.get("context", [])
    return [chosen for job in jobs for chosen in _as_asked(job, copies_on)]


def _as_asked(job: Job, copies_on: RunsOn | None) -> Iterator[Job]:
    """A job as --copies-on has it, if at all. The tier chooses over its own memory alone; the host does not copy."""
    if job.tier == "host" or (job.by == "rank" and copies_on != "peer"):
        yield job
    elif job.by == "tier" and job.memory == "tier" and copies_on != "rank":
        yield job if copies_on is None else dataclasses.replace(job, by=copies_on)


def _jobs_of(path: str, number: int, memory: str, quick: bool) -> Iterator[Job]:
    if path.endswith(("both", "matmul", "enqueue")):
        if number != MAIN:
            return
        yield _job(path, number, memory, quick, "shipped", {}, by="tier")
        if path.endswith("both"):
            yield _job(path, number, memory, quick, "rank", {}, targeted=False)
            yield _job(path, number, memory, quick, "link", link_settings(path, number))
        elif path.endswith("matmul"):
            for tuning, changes in MATMUL_KERNELS.items():
                yield _job(path, number, memory, quick, tuning, changes)
        else:
            yield _job(path, number, memory, quick, "rank", {})
        return
    if path.startswith("peer"):
        yield _job(path, number, memory, quick, "shipped", {}, by="tier")
        yield _job(path, number, memory, quick, "rank", {}, targeted=False)
    else:
        yield _job(path, number, memory, quick, "shipped", {}, targeted=False)
    link = _job(path, number, memory, quick, "link", link_settings(path, number))
    yield link
    if number == MAIN:
        # What multiprocessors reach at all. Scattered pages at the same rate cost nothing.
        yield dataclasses.replace(link, tuning="in order", target=None, in_order=True)
        engine = _job(path, number, memory, quick, "a batch of pages", {}, targeted=False)
        yield dataclasses.replace(engine, kernel="engine", case=engine.case.limited(HOST_BYTES))
    if number == MAIN and path == "host_load":
        for run_pages in RUNS_OF_PAGES:
            job = _job(path, number, memory, quick, f"staged, runs of {run_pages} pages", {})
            yield dataclasses.replace(job, kernel="staged", run_pages=run_pages)
    if number == MAIN and path.startswith("peer"):
        few, settings = f"at most {FEW_CTAS} blocks", LINK_SETTINGS["peer few blocks"]
        yield _job(path, number, memory, quick, few, settings, ctas=FEW_CTAS, by="tier")
        yield _job(path, number, memory, quick, f"rank, {few}", settings, ctas=FEW_CTAS)
    if number in (MAIN, ROWS) and not quick:
        job = _job(path, number, memory, quick, "triton", {"ctas": FEW_CTAS}, targeted=False)
        yield dataclasses.replace(job, kernel="triton")


def _job(
    path: str,
    number: int,
    memory: str,
    quick: bool,
    tuning: str,
    changes: Changes,
    *,
    ctas: int | None = None,
    targeted: bool = True,
    by: By = "rank",
) -> Job:
    case = CASES[number]
    if quick:
        case = case.limited(QUICK_BYTES, keep_planes=path.endswith("enqueue"))
    elif path.startswith("host"):
        case = case.limited(HOST_BYTES)
    aim = target(path, number, ctas) if targeted and not quick else None
    return Job(path, memory, number, case, "cuda", tuning, dict(changes), aim, by)


def given_jobs(
    jobs: Sequence[Job],
    tunings: Sequence[Changes],
    limits: Sequence[int],
    copies_on: RunsOn = "rank",
) -> list[Job]:
    """`jobs` with the user's settings in place of this package's: each tuning with each number of blocks (0: its own).

    Each link by itself: without relays.

    Args:
        copies_on: the GPU that runs a peer's copies, which the settings are for.
    """
    once: dict[tuple[str, str, int], Job] = {}
    for job in jobs:
        if job.memory != RELAYED:
            once.setdefault((job.path, job.memory, job.number), job)
    result = []
    for job in once.values():
        for tuning in tunings:
            for ctas in limits:
                changes = {**tuning, **({"ctas": ctas} if ctas else {})}
                by = _runner(job.tier, copies_on)
                new = dataclasses.replace(job, kernel="cuda", tuning="given", changes=changes, by=by, target=None)
                result.append(aimed(new, changes.get("ctas")) if any(j.target for j in jobs) else new)
    return result


def _runner(tier: str, copies_on: RunsOn) -> By:
    return copies_on if tier == "peer" else "rank"


def aimed(job: Job, ctas: int | None) -> Job:
    """A job with settings of its own and its target; few blocks are an excuse where they are the rank's GPU's."""
    return dataclasses.replace(job, target=target(job.path, job.number, ctas if job.by == "rank" else None))


def tune_jobs(
    paths: Sequence[str],
    numbers: Sequence[int],
    memories: Sequence[str] | None,
    quick: bool,
    limits: Sequence[int],
    copies_on: RunsOn = "rank",
) -> list[Job]:
    """Every kernel of TUNE_KERNELS with every number of blocks (`limits`, or TUNE_CTAS), for each path and case."""
    kernels = TUNE_KERNELS[1::5] if quick else TUNE_KERNELS
    jobs = []
    for path in paths:
        if not path.endswith(("load", "store")):
            continue
        tier = path.partition("_")[0]
        by = _runner(tier, copies_on)
        counts = TUNE_CTAS_BY_PEER if by == "peer" else TUNE_CTAS[tier]
        for memory in (memories or ("tier",)) if tier == "peer" else ("tier",):
            for number in numbers:
                case = CASES[number].limited(QUICK_BYTES if quick else TUNE_BYTES[tier])
                for kernel in kernels:
                    for ctas in limits or (counts[1:2] if quick else counts):
                        changes = {**kernel, "ctas": ctas}
                        jobs.append(Job(path, memory, number, case, "cuda", "candidate", changes, by=by))
    return jobs


def cpu_jobs(paths: Sequence[str], numbers: Sequence[int] | None, quick: bool) -> list[Job]:
    """Host copies by the torch copier, for a machine without a GPU. There is no link, so there are no targets."""
    numbers = range(ROWS + 1) if numbers is None else numbers
    nbytes = QUICK_CPU_BYTES if quick else CPU_BYTES
    return [
        Job(path, "tier", number, CASES[number].limited(nbytes), "torch", "torch")
        for number in numbers
        for path in paths
        if path in CPU_PATHS
    ]


def by_speed(rows: Iterable[Row]) -> list[Row]:
    """Candidates of one path and case, best first: fewest blocks among those near the fastest, then by speed."""
    fast = sorted(rows, key=lambda row: -row["gbps"])
    near = [row for row in fast if row["gbps"] >= (1 - TUNE_TOLERANCE) * fast[0]["gbps"]]
    near.sort(key=lambda row: (row["ctas"], -row["gbps"]))
    return near + fast[len(near) :]


def tuned_configs(rows: Iterable[Row]) -> list[tuple[str, dict[str, Any]]]:
    """What --tune found, as (what it is for, a value for --hicache-xmem-config), from its `best` rows.

    A peer's says who copies, for settings of one GPU are not the other one's.
    """
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        if row.get("tuning") == "best" and row.get("verified"):
            tier, _, direction = row["path"].partition("_")
            config = found.setdefault((tier, row["memory"], row["case"]), {})
            if tier == "peer":
                config["peer"] = {"copy_on": row.get("runs_on", "rank")}  # rows of before are the rank's
            config.setdefault("copy", {})[direction] = row["changes"]
    return [
        (f"{'peer' if tier == 'peer' else 'dram'}{'' if memory == 'tier' else f' ({memory})'}, {case}", config)
        for (tier, memory, case), config in found.items()
    ]


def reached(row: Row) -> bool | None:
    """Whether a row is as good as its target: a ratio at least, a slow-down or a time at most; None without one."""
    aim = row.get("target")
    if aim is None:
        return None
    if "slowdown" in row:
        return bool(row["slowdown"] <= aim and row["ratio"] >= MATMUL_LINK_SHARE)
    if "us" in row:
        return bool(row["us"] <= aim)
    return bool(row["ratio"] >= aim)
