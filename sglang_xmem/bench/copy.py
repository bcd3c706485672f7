"""`sglang-xmem bench copy`: page copies against a contiguous copy-engine copy of as many bytes, in the same run.

Scattered pages between this GPU and a tier: one way, both ways at once, beside a matrix product, and the time that
enqueueing a load takes; over a peer as the tier copies by itself, and by this GPU beside that. Bytes are verified after
each case. A case that cannot run here says WAIVED and why. Without a GPU host copies by the torch copier are measured.
--tune looks for the best settings of the CUDA kernel.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sglang_xmem.bench import copy_jobs, copy_memory, report
from sglang_xmem.bench.copy_jobs import CASES, CPU_PATHS, MEMORIES, PATHS, Job, Row, RunsOn
from sglang_xmem.bench.progress import Progress
from sglang_xmem.bench.runs import INTERRUPTED, Results, add_output_arguments, at_least, terminated_as_interrupt
from sglang_xmem.copies.tuning import CudaTuning
from sglang_xmem.errors import ConfigError, TierUnavailable

if TYPE_CHECKING:
    from sglang_xmem.bench.copy_measure import Machine
    from sglang_xmem.tiers import Region

#: Left free of a peer's memory.
PEER_RESERVE_BYTES = 2 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cases = "; ".join(f"{number} {case.label}" for number, case in enumerate(CASES))
    parser.add_argument("--paths", default=",".join(PATHS), help="comma-separated: " + ",".join(PATHS))
    parser.add_argument("--cases", default="", help=f"comma-separated numbers; default: what fits the time; {cases}")
    parser.add_argument("--gpu", type=at_least(0), default=0, help="CUDA ordinal of the rank's GPU")
    parser.add_argument(
        "--peer", type=at_least(0), default=None, help="GPU whose memory is the peer's; default: the next one"
    )
    parser.add_argument(
        "--relays",
        default=None,
        help="comma-separated GPUs that relay host memory in rows `relayed`; default: the peer",
    )
    parser.add_argument("--repetitions", type=int, default=5, help="of each copy; short ones take at least 20")
    parser.add_argument(
        "--tunings", default=None, help="JSON list of changes to the tier's own settings, in place of those measured"
    )
    parser.add_argument("--ctas", default=None, help="comma-separated numbers of thread blocks; 0 is the settings' own")
    parser.add_argument(
        "--memory",
        default=None,
        help="peer memory, comma-separated: tier (as the tier has it), asleep (the same without a context on the "
        "peer), context (cuMemAlloc in one); default: tier, and the main case once over the others",
    )
    parser.add_argument(
        "--copies-on",
        default=None,
        help="which GPU runs the copies of a peer's memory: rank or peer; default: as the tier does and by the rank "
        "beside it, with --tunings, --ctas and --tune by the rank",
    )
    parser.add_argument("--tune", action="store_true", help="try many settings, and print the best as configuration")
    parser.add_argument("--quick", action="store_true", help="the least that still shows something; says little")
    add_output_arguments(parser, "copy")


@dataclasses.dataclass(frozen=True)
class Options:
    """What the arguments say, checked.

    Attributes:
        numbers, memories, tunings, limits, copies_on, relays: None where nothing was given.
    """

    paths: tuple[str, ...]
    numbers: tuple[int, ...] | None
    memories: tuple[str, ...] | None
    tunings: tuple[dict[str, Any], ...] | None
    limits: tuple[int, ...] | None
    copies_on: RunsOn | None
    relays: tuple[int, ...] | None
    repetitions: int
    quick: bool
    tune: bool


def parse(args: argparse.Namespace) -> Options:
    """The options, as far as no device is needed to check them.

    Raises:
        ConfigError: one sentence.
    """
    if args.repetitions < 1:
        raise ConfigError(f"--repetitions {args.repetitions} is too few; give at least 1.")
    if args.tune and args.tunings is not None:
        raise ConfigError("--tune tries its own settings; leave --tunings out, or leave --tune out.")
    numbers = _numbers("--cases", args.cases)
    for number in numbers or ():
        if number >= len(CASES):
            raise ConfigError(f"--cases {number}: choose from 0 to {len(CASES) - 1}.")
    limits = _numbers("--ctas", args.ctas)
    if args.tune and limits is not None and 0 in limits:
        raise ConfigError("--ctas 0 says nothing to --tune; give numbers of thread blocks to try.")
    memories = None if args.memory is None else _names("--memory", args.memory, MEMORIES)
    if args.copies_on not in (None, "rank", "peer"):
        raise ConfigError(f"--copies-on {args.copies_on}: choose from rank, peer.")
    if args.copies_on == "peer" and memories not in (None, ("tier",)):
        raise ConfigError("--copies-on peer is for memory as the tier maps it; leave --memory out, or give tier.")
    return Options(
        paths=_names("--paths", args.paths, PATHS),
        numbers=numbers,
        memories=memories,
        tunings=None if args.tunings is None else _tunings(args.tunings),
        limits=limits,
        copies_on=args.copies_on,
        relays=_numbers("--relays", args.relays),
        repetitions=min(args.repetitions, 2 if args.quick else 3) if args.quick or args.tune else args.repetitions,
        quick=args.quick,
        tune=args.tune,
    )


def _names(option: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise ConfigError(f"{option} {name}: choose from {', '.join(known)}.")
    if not names:
        raise ConfigError(f"{option} is empty; choose from {', '.join(known)}.")
    return tuple(dict.fromkeys(names))


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    if text is None or not text.strip():
        return None
    try:
        numbers = tuple(dict.fromkeys(int(part) for part in text.split(",")))
        if min(numbers) < 0:
            raise ValueError
    except ValueError:
        raise ConfigError(f"{option} {text} is not a list of numbers; give one such as 0,1.") from None
    return numbers


def _tunings(text: str) -> tuple[dict[str, Any], ...]:
    try:
        given = json.loads(text)
    except ValueError:
        given = None
    if not isinstance(given, list) or not given or not all(isinstance(item, dict) for item in given):
        raise ConfigError(f'--tunings {text} is not a JSON list of objects; give one such as [{{"ctas": 16}}].')
    for changes in given:
        try:
            dataclasses.replace(CudaTuning(), **changes)
        except (TypeError, ValueError) as error:
            known = ", ".join(setting.name for setting in dataclasses.fields(CudaTuning))
            raise ConfigError(f"--tunings: {json.dumps(changes)} is wrong: {error}; known keys: {known}.") from None
    return tuple(given)


def plan(options: Options, on_gpu: bool) -> list[Job]:
    """The jobs of a run, those over the same memory next to each other.

    Raises:
        ConfigError: nothing is left to do.
    """
    if not on_gpu:
        if options.tune:
            raise ConfigError("--tune needs a GPU, for the torch copier has no settings; leave it out here.")
        jobs = copy_jobs.cpu_jobs(options.paths, options.numbers, options.quick)
    elif options.tune:
        by = options.copies_on or "rank"
        numbers, limits = options.numbers or tuple(range(len(CASES))), options.limits or ()
        jobs = copy_jobs.tune_jobs(options.paths, numbers, options.memories, options.quick, limits, by)
    else:
        given = options.tunings is not None or options.limits is not None
        memories = options.memories or (("tier",) if given else None)
        jobs = copy_jobs.gpu_jobs(options.paths, options.numbers, memories, options.quick, options.copies_on)
        if given:
            by = options.copies_on or "rank"  # whose GPU the settings are most likely for
            jobs = copy_jobs.given_jobs(jobs, options.tunings or ({},), options.limits or (0,), by)
    if not jobs:
        where = "with these --cases" if on_gpu else f"without a GPU, which has {', '.join(CPU_PATHS)} alone"
        raise ConfigError(f"--paths {','.join(options.paths)} has nothing to measure {where}.")
    return jobs


def find_machine(gpu: int) -> Machine:
    """The GPU of an ordinal, or the CPU where there is none.

    Raises:
        ConfigError: there are GPUs, and not this one.
    """
    import torch

    from sglang_xmem.bench import copy_measure

    if not torch.cuda.is_available():
        return copy_measure.Cpu()
    count = torch.cuda.device_count()
    if not 0 <= gpu < count:
        raise ConfigError(f"--gpu {gpu} is not there; this process sees GPUs 0 to {count - 1}.")
    return copy_measure.Gpu(gpu)


def find_peer(gpu: int, peer: int | None) -> int | None:
    """The peer's ordinal: the one asked for, or the next one; None on a machine with one GPU.

    Raises:
        ConfigError: the one asked for is not there, or it is the GPU itself.
    """
    import torch

    count = torch.cuda.device_count()
    if peer is not None and (peer == gpu or not 0 <= peer < count):
        raise ConfigError(
            f"--peer {peer} is not another GPU; this process sees GPUs 0 to {count - 1}, and copies for {gpu}."
        )
    if peer is None and count > 1:
        peer = (gpu + 1) % count
    return peer


def run(args: argparse.Namespace) -> int:
    options = parse(args)
    machine = find_machine(args.gpu)
    jobs = plan(options, machine.is_gpu)
    peer = find_peer(args.gpu, args.peer) if machine.is_gpu else None
    if not machine.is_gpu:
        print("No GPU on this machine: host copies by the torch copier are measured, without a link to compare with.")
    results = Results("copy", args, {**dataclasses.asdict(options), "gpu": args.gpu, "peer": peer})
    return Runner(args, options, machine, peer, jobs, results).run()


class Runner:
    """Takes jobs through their measurements; every row is in the file before the next job begins.

    Args:
        args, options: the command's.
        machine: the rank's.
        peer: ordinal of the GPU whose memory is the peer's, if any.
        jobs: in order.
        results: where rows go.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        options: Options,
        machine: Machine,
        peer: int | None,
        jobs: Sequence[Job],
        results: Results,
    ) -> None:
        self.options, self.machine, self.peer, self.results = options, machine, peer, results
        self.gpu: int | None = args.gpu if machine.is_gpu else None
        self.jobs = [job for job in jobs if (job.key, 0) not in results.done]
        if len(self.jobs) < len(jobs):
            done = len(jobs) - len(self.jobs)
            print(f"{done} of {len(jobs)} are in {results.path} already, run {results.run}", file=sys.stderr)
        self.failed = any(map(_is_wrong, results.earlier))  # resuming makes no wrong byte right

    def run(self) -> int:
        """Exit status: 0, 1 with an error or a wrong byte, INTERRUPTED."""
        interrupted = False
        with Progress(len(self.jobs)) as self.progress, terminated_as_interrupt():
            try:
                for (tier, memory), group in itertools.groupby(self.jobs, key=lambda job: (job.tier, job.memory)):
                    self._over(tier, memory, list(group))
            except KeyboardInterrupt:
                interrupted = True
                self.progress.say("interrupted")
        self.results.finish()
        return INTERRUPTED if interrupted else 1 if self.failed else 0

    def _over(self, tier: str, memory: str, jobs: list[Job]) -> None:
        """Jobs over the same memory, which is allocated once."""
        import torch

        from sglang_xmem.bench.copy_measure import Scene

        self.progress.engine(f"{tier} memory" if memory == "tier" else f"{tier} memory, {memory}", len(jobs))
        self.progress.started()
        try:
            jobs = self._fitted(tier, jobs)
            nbytes = max(Scene.nbytes(job.case) for job in jobs)
            region = self._allocate(tier, memory, nbytes, by_peer=any(job.by == "peer" for job in jobs))
        except (ConfigError, TierUnavailable) as reason:
            self._write(jobs[0], _on_each_path(jobs, waived=str(reason)))
            self.progress.engine_done()
            return
        try:
            from sglang_xmem.pool import region_bytes

            locality = "device" if tier == "peer" else "host"
            there = region_bytes(region, self.machine.device)
            here = torch.empty(nbytes, dtype=torch.uint8, device=self.machine.device)
            for (case, in_order, run_pages), same in itertools.groupby(
                jobs, key=lambda job: (job.case, job.in_order, job.run_pages)
            ):
                scene = Scene(
                    self.machine,
                    there,
                    here,
                    case,
                    locality,
                    region.copying_gpu,
                    in_order,
                    relays=region.relays,
                    run_pages=run_pages,
                )
                for job, following in _with_next(list(same)):
                    self._measure(job, scene)
                    if job.tuning == "candidate" and not _same_search(job, following):
                        self._best(job, scene)
        except (RuntimeError, ConfigError) as error:  # no memory for this side, or the device is lost
            self._write(jobs[0], _on_each_path(jobs, error=_sentence(error)))
        finally:
            # After an error of the device nothing can be waited for; the memory goes back all the same.
            with contextlib.suppress(Exception):
                self.machine.synchronize()
            region.release()
            self.progress.engine_done()

    def _allocate(self, tier: str, memory: str, nbytes: int, by_peer: bool) -> Region:
        """The memory of some jobs.

        Args:
            by_peer: the peer has to copy.

        Raises:
            ConfigError, TierUnavailable: it cannot be had, or the peer cannot copy.
        """
        if (tier == "peer" or memory == copy_jobs.RELAYED) and self.peer is None:
            raise TierUnavailable("this machine has one GPU, and a peer or relay is another one")
        relays = self.options.relays or (() if self.peer is None else (self.peer,))
        region = copy_memory.allocate(tier, memory, self.gpu, self.peer, nbytes, relays)
        if by_peer and region.copying_gpu is None:
            region.release()
            assert self.peer is not None
            assert self.gpu is not None
            raise TierUnavailable(copy_memory.why_not_by(self.peer, self.gpu))
        return region

    def _fitted(self, tier: str, jobs: Sequence[Job]) -> list[Job]:
        """Jobs with their cases cut to the memory that is free on both sides; rows say how large they were."""
        room = self.machine.room()
        if tier == "peer" and self.peer is not None:
            from sglang_xmem import gpus

            room = min(room, gpus.memory_bytes(self.peer)[0] - PEER_RESERVE_BYTES)
        elif tier == "host":
            import psutil

            room = min(room, int(psutil.virtual_memory().available // 4))
        return [
            dataclasses.replace(job, case=job.case.limited(room // 2, keep_planes=job.path.endswith("enqueue")))
            for job in jobs
        ]

    def _measure(self, job: Job, scene: Any) -> list[Row]:
        from sglang_xmem.bench import copy_measure

        try:
            rows = copy_measure.measure(job, scene, self.options.repetitions)
        except ImportError as error:
            rows = [
                {**copy_measure.describe(job, self.machine), "waived": f"the copier {job.kernel!r} needs {error.name}"}
            ]
        except Exception as error:  # one case that fails must not take the others' rows with it
            rows = [{**copy_measure.describe(job, self.machine), "changes": job.changes, "error": _sentence(error)}]
        self._write(job, rows)
        return rows

    def _best(self, last: Job, scene: Any) -> None:
        """Of all candidates of a search the best whose bytes are right, measured again."""
        rows = report.rows_of_run(report.read_rows(self.results.path), self.results.run)
        mine = [
            row
            for row in rows
            if row.get("tuning") == "candidate"
            and "ratio" in row
            and (row["path"], row["memory"], row["case"]) == (last.path, last.memory, last.case.label)
        ]
        for row in copy_jobs.by_speed(mine):
            best = dataclasses.replace(last, tuning="best", changes=row["changes"])
            best = copy_jobs.aimed(best, row["ctas"])
            if all(found.get("verified") for found in self._measure(best, scene)):
                return

    def _write(self, job: Job, rows: list[Row]) -> None:
        if job.tier == "peer" and self.peer is not None:
            from sglang_xmem import gpus

            # Whether the peer was awake: its clock says it right after a copy as well as during one.
            clock = gpus.sm_clock_mhz(self.peer)
            rows = [{**row, "peer_sm_mhz": clock} for row in rows]
        complete = not any("error" in row for row in rows)
        self.results.write(rows, job.key, 0, complete)
        for row in rows:
            self.failed = self.failed or _is_wrong(row)
            if row.get("tuning") != "candidate" or "error" in row:
                self.progress.say(report.copy_line(row))
        self.progress.step(str(job), 0 if job.tuning == "best" else 1)


def _is_wrong(row: Row) -> bool:
    return "error" in row or row.get("verified") is False


def _on_each_path(jobs: Sequence[Job], **what: str) -> list[Row]:
    return [{"path": path, "memory": jobs[0].memory, **what} for path in dict.fromkeys(job.path for job in jobs)]


def _with_next(jobs: list[Job]) -> list[tuple[Job, Job | None]]:
    return list(zip(jobs, [*jobs[1:], None], strict=True))


def _same_search(job: Job, other: Job | None) -> bool:
    return other is not None and (job.path, job.memory, job.number) == (other.path, other.memory, other.number)


def _sentence(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
