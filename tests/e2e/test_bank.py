"""Engines that share mtierd's page bank, on the CPU engine: one finds what another stored, and what a dead one left.

Each server start takes most of a minute, so one test takes a bank through its life.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.sglang_server import Answer
from tests import REPOSITORY
from tests.e2e import harness, kill_matrix
from tests.e2e.bank_rig import Engine, Service, engine, places, until
from tests.e2e.harness import LONGER, PROMPT_TOKENS
from tests.e2e.kinds import KINDS, Kind

pytestmark = pytest.mark.cpu_engine

#: Whole pages, and one token is computed.
CACHEABLE = (PROMPT_TOKENS - 1) // 16 * 16


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    service = Service(tmp_path)
    yield service
    service.kill()


def make_model(kind: Kind, directory: Path) -> Path:
    script = REPOSITORY / "scripts" / "make_tiny_model.py"
    subprocess.run([sys.executable, str(script), str(directory), *kind.model], check=True)
    return directory


#: What the log says where nothing answered in time, which is a miss and no fault on a machine that is busy enough.
LATE = ("did not respond within", "reason=deadline", "closed the connection")


def find_in_bank(engine: Engine, name: str, hit: int = CACHEABLE, n_tokens: int = PROMPT_TOKENS) -> Answer:
    """The answer to a prompt whose pages the engine has not and the bank has."""
    for _ in range(4):
        answer = engine.ask(name, n_tokens)
        if places(answer) == {"storage": hit}:
            return answer
        assert not places(answer)
        assert any(words in engine.server.log() for words in LATE)
        until(engine.client.flush_cache)
    raise AssertionError(f"the bank never answered in time: {answer}")


def ask_bank(engine: Engine, name: str, expected: Answer) -> Answer:
    """As find_in_bank, and the answer equals an earlier one."""
    answer = find_in_bank(engine, name)
    assert answer.output_ids == expected.output_ids
    return answer


def change_weights(model: Path) -> None:
    """Other embeddings in files of the same names and sizes."""
    from safetensors.torch import load_file, save_file

    (weights,) = model.glob("*.safetensors")
    tensors = load_file(weights)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, model / "new", {"format": "pt"})
    os.replace(model / "new", weights)  # engines may have the old one mapped


def test_life_of_a_bank(tiny_model: Path, tmp_path: Path, service: Service) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))

    with engine(model, service, tmp_path / "first.log") as first, contextlib.ExitStack() as others:
        cold = first.ask("A")
        assert places(cold) == {}
        hit = first.ask("A")
        assert places(hit) == {"device": CACHEABLE}
        until(lambda: service.pages() >= CACHEABLE // 16)

        # Another engine finds the pages; what it is asked later, the first one finds.
        second = others.enter_context(engine(model, service, tmp_path / "second.log"))
        shared = ask_bank(second, "A", cold)
        assert shared.logprobs == hit.logprobs  # the same computation on the same bytes
        assert second.ask("A with another prefix").output_ids != cold.output_ids
        before = service.pages()
        there = second.ask("B")
        until(lambda: service.pages() >= before + CACHEABLE // 16)
        ask_bank(first, "B", there)
        # flush_cache empties the engine and not the bank.
        until(second.client.flush_cache)
        ask_bank(second, "A", cold)

        # A killed engine's pages outlive it.
        first.kill()
        until(lambda: len(service.status()["spaces"][0]["sessions"]) == 1)
        until(second.client.flush_cache)
        ask_bank(second, "B", there)

        # What serves is killed and started again with its memory: the engine continues, and rejoins.
        service.kill_serving()
        until(second.client.flush_cache)
        assert second.ask("A").output_ids == cold.output_ids  # found, or not yet
        until(lambda: bool(second.client.flush_cache() and places(second.ask("B"))))
        until(second.client.flush_cache)
        ask_bank(second, "B", there)
        before = service.pages()
        second.ask("E")
        until(lambda: service.pages() >= before + CACHEABLE // 16)

        # Only the service is left: the next engine's first hit comes from the bank.
        second.kill()
        until(lambda: not service.status()["spaces"][0]["sessions"])
        second = others.enter_context(engine(model, service, tmp_path / "second again.log"))
        ask_bank(second, "B", there)

        # Other weights under the same name find nothing, though the bank has these very prompts.
        change_weights(model)
        with engine(model, service, tmp_path / "third.log") as third:
            other = third.ask("B")
            assert places(other) == {}
            assert other.output_ids != there.output_ids

        service.flush()
        until(second.client.flush_cache)
        assert places(second.ask("A")) == {}

        # Without the service nothing is found, nothing hangs, and what is stored comes back from the engine's own pool.
        service.kill()
        begun = time.monotonic()
        alone = second.ask("C")
        assert places(alone) == {}
        for number in range(4):
            second.ask(f"flood {number}")
        again = second.ask("C")
        assert time.monotonic() - begun < 60
        assert places(again) == {"host": CACHEABLE}
        assert again.output_ids == alone.output_ids
        # Another service, without the memory: the engine returns it, with what was published before.
        service.start()
        until(lambda: any(space["sessions"] for space in service.status()["spaces"]))
        before = service.pages()
        last = second.ask("D")
        until(lambda: service.pages() >= before + CACHEABLE // 16)
        until(second.client.flush_cache)
        ask_bank(second, "D", last)
        assert "so they are private now" not in second.server.log()


@pytest.mark.parametrize("name", ["dsa", "draft"])
def test_pools_that_ride_on_a_page_come_with_it(name: str, tmp_path: Path, service: Service) -> None:
    """An indexer's keys and a draft's K and V are in the frame of the page that they ride on."""
    kind = KINDS[name]
    model = make_model(kind, tmp_path / "model")
    draft = {"speculative_draft_model_path": str(model)} if kind.draft else {}
    with engine(model, service, tmp_path / "log", {**kind.options, **draft}) as one:
        cold, hit = one.ask("A"), one.ask("A")
        assert places(hit) == {"device": kind.hit}
        until(one.client.flush_cache)
        found = ask_bank(one, "A", cold)
        assert found.logprobs == hit.logprobs
        assert found.verifications == hit.verifications


@pytest.mark.parametrize("name", ["swa", "gdn"])
def test_spaces_of_their_own_are_shared_too(name: str, tmp_path: Path, service: Service) -> None:
    """A window's pages and a state at a prefix's end come from the bank with the pages of K and V that they belong to.

    Without either of the two, the same hit gives another output.
    """
    kind = KINDS[name]
    model = make_model(kind, tmp_path / "model")
    tokens, again = kind.prompt_tokens, f"A{LONGER}" if kind.extend else "A"
    pool_tokens = kind.options.get("max_total_tokens", harness.DEVICE_POOL_TOKENS)
    leave_out = tmp_path / "leave_out"
    variables = {**harness._with_plugin(), harness.LEAVE_OUT: str(leave_out)}
    with engine(model, service, tmp_path / "first.log", kind.options) as first:
        first.ask("A", tokens)
        first.ask(again, tokens)
        expected = first.ask(again, tokens)
        assert places(expected) == {"device": kind.hit}
        until(lambda: not any(space["pages"] == 0 for space in service.status()["spaces"]))
        with engine(model, service, tmp_path / "second.log", kind.options, variables) as second:
            found = find_in_bank(second, again, kind.hit, tokens)
            assert (found.output_ids, found.logprobs) == (expected.output_ids, expected.logprobs)
            for pool in kind.loads:
                until(second.client.flush_cache)
                # More than the GPU's pool holds: it would still have what was loaded before, in slots that a hit gets.
                for other in range(pool_tokens // tokens + 2):
                    second.ask(f"other {other}", tokens)
                until(second.client.flush_cache)
                leave_out.write_text(pool)
                without = find_in_bank(second, again, kind.hit, tokens)
                assert without.output_ids != expected.output_ids


def flip_a_byte_of_each_frame(service: Service) -> None:
    """Damage every frame of the only space, as failing memory would."""
    (space,) = service.status()["spaces"]
    nbytes = space["frames"] * space["frame_bytes"]
    parent = service.process.pid
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    slabs: dict[int, Path] = {}
    for pid in (parent, *children):
        for file in Path(f"/proc/{pid}/fd").iterdir():
            if "memfd:" in os.readlink(file) and file.stat().st_size >= nbytes:
                slabs[file.stat().st_ino] = file
    assert slabs
    for slab in slabs.values():  # including the unused one that is populated for the next space
        with slab.open("r+b", buffering=0) as memory:
            for frame in range(space["frames"]):
                memory.seek(frame * space["frame_bytes"] + 1001)  # the high half of a key's element
                (before,) = memory.read(1)
                memory.seek(-1, os.SEEK_CUR)
                memory.write(bytes([before ^ 0x40]))


def test_a_damaged_page_is_found_by_nobody(tiny_model: Path, tmp_path: Path, service: Service) -> None:
    checks = {"hicache_xmem_config": {"integrity": "full"}}
    with engine(tiny_model, service, tmp_path / "first.log", checks) as first, contextlib.ExitStack() as others:
        cold = first.ask("A")
        until(lambda: service.pages() >= CACHEABLE // 16)
        # Without checks the damage shows: else that an answer is right would say nothing.
        second = others.enter_context(
            engine(tiny_model, service, tmp_path / "second.log", {"hicache_xmem_config": {"integrity": "off"}})
        )
        ask_bank(second, "A", cold)
        until(second.client.flush_cache)
        flip_a_byte_of_each_frame(service)
        assert find_in_bank(second, "A").output_ids != cold.output_ids
        until(first.client.flush_cache)
        for _ in range(4):  # it may be late, and find nothing then
            answer = first.ask("A")
            assert answer.output_ids == cold.output_ids
            if service.status()["spaces"][0]["damaged"]:
                break
            until(first.client.flush_cache)
        assert "are damaged" in first.server.log()
        assert service.status()["spaces"][0]["damaged"] >= CACHEABLE // 16
        until(second.client.flush_cache)
        assert second.ask("A").output_ids == cold.output_ids


def test_ranks_with_the_same_latents_keep_them_once(tmp_path: Path, service: Service) -> None:
    """Both ranks hold the pages of a prompt, in one set of frames; so a pool of its own for each would take twice."""
    kind = KINDS["mla"]
    model = make_model(kind, tmp_path / "model")
    variables = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}  # of each rank
    with engine(model, service, tmp_path / "log", {**kind.options, "tp_size": 2}, variables) as one:
        cold, hit = one.ask("A"), one.ask("A")
        assert places(hit) == {"device": kind.hit}
        until(lambda: frames(service, "shared") >= kind.hit // 16)
        held = [session["held"] for session in service.status()["spaces"][0]["sessions"]]
        assert len(held) == 2
        in_use = frames(service, "frames") - frames(service, "free")
        assert min(held) >= kind.hit // 16
        # What they do not share is a page that the last answer is filling.
        assert in_use <= sum(held) / 2 + 2
        until(one.client.flush_cache)
        found = ask_bank(one, "A", cold)
        assert found.logprobs == hit.logprobs


def frames(service: Service, state: str) -> int:
    (space,) = service.status()["spaces"]
    return int(space[state])


def test_kills_lose_no_answer_of_an_engine_that_lives_and_make_none_wrong(tiny_model: Path, tmp_path: Path) -> None:
    rows = list(kill_matrix.Matrix(tiny_model, tmp_path, rounds=3).run(victims=["service"]))
    assert [row.phase for row in rows] == list(kill_matrix.PHASES)
    assert all((row.wrong, row.hung, row.lost_requests) == (0, 0, 0) for row in rows), rows
    assert all(row.answers >= 6 for row in rows)
    # The service has its pages after each kill.
    assert sum(row.found_tokens for row in rows) >= CACHEABLE
