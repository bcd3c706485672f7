"""What makes two engines' pages equal, and what an update of the weights does to that."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_xmem.engines.sglang import identity, sharing


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"rope_theta": 1e6}')
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 4096)
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


def test_a_digest_of_weights_sees_every_change(model: Path) -> None:
    weights = model / "model.safetensors"
    times = weights.stat()
    seen = {identity.weights_digest(str(model))}
    (model / "tokenizer.json").write_text('{"other": 1}')
    (model / "README.md").write_text("words")
    assert identity.weights_digest(str(model)) in seen
    assert identity.weights_digest(str(weights)) not in seen

    def changed() -> None:
        digest = identity.weights_digest(str(model))
        assert digest not in seen
        seen.add(digest)

    (model / "config.json").write_text('{"rope_theta": 2e6}')
    changed()
    weights.write_bytes(bytes(reversed(range(256))) * 4096)  # as many bytes, and as old
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    changed()
    os.utime(weights)
    changed()
    (model / "model-2.safetensors").write_bytes(b"more")
    changed()


@pytest.mark.parametrize("name", ["/no/such/model", "no-such-owner/no-such-model", "s3://bucket/model"])
def test_weights_that_are_not_here_are_not_identified(name: str) -> None:
    with pytest.raises(identity.Unidentified):
        identity.weights_digest(name)


def test_weights_without_files_are_not_identified(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(identity.Unidentified, match="no files of weights"):
        identity.weights_digest(str(tmp_path))


def test_files_that_change_while_they_are_loaded_are_shared_with_nobody(model: Path) -> None:
    def look_up() -> dict[str, Any]:
        return {"weights": identity.weights_digest(str(model))}

    active: Any = SimpleNamespace(facts=look_up(), look_up_facts=look_up)
    assert identity.is_settled(active)
    (model / "model.safetensors").write_bytes(b"new")
    assert not identity.is_settled(active)
    assert active.facts is None


def test_facts_name_what_a_page_depends_on(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity.versions, "installed", lambda: "0.5.23")

    def facts(tag: str = "", **changes: Any) -> Any:
        settings = dict.fromkeys(identity._SETTINGS, None)
        record = {**settings, "model_path": str(model), "load_format": "auto", "random_seed": 1, **changes}
        return identity.facts(SimpleNamespace(**record), tag)

    assert facts() == facts(random_seed=2, served_model_name="another")
    for other in (
        {"dtype": "float16"},
        {"kv_cache_dtype": "fp8_e4m3"},
        {"quantization": "fp8"},
        {"json_model_override_args": '{"rope_scaling": null}'},
        {"page_size": 64},
        {"load_format": "dummy"},
        {"load_format": "dummy", "random_seed": 2},
        {"tag": "mine"},
    ):
        assert facts(**other) != facts()
    assert facts(load_format="dummy", random_seed=2) != facts(load_format="dummy", random_seed=1)


@pytest.mark.parametrize("form", ["{}", "name={}", "mapping", "one mapping for all"])
def test_an_adapter_that_is_trained_again_under_its_name_shares_nothing(
    form: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity.versions, "installed", lambda: "0.5.23")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"one")
    given: Any = [form.format(adapter)]
    if form == "mapping":
        given = [{"lora_name": "name", "lora_path": str(adapter)}]
    elif form == "one mapping for all":
        given = {"name": str(adapter)}

    def facts(**changes: Any) -> Any:
        settings = dict.fromkeys(identity._SETTINGS, None)
        record = {**settings, "model_path": str(model), "load_format": "auto", **changes}
        return identity.facts(SimpleNamespace(**record), "")

    before = facts(lora_paths=given)
    assert before == facts(lora_paths=given)
    assert before != facts()
    (adapter / "adapter_model.safetensors").write_bytes(b"two")
    assert facts(lora_paths=given) != before
    (adapter / "adapter_model.safetensors").unlink()
    monkeypatch.setattr(identity.session, "current", lambda: SimpleNamespace(notes=[]))
    assert facts(lora_paths=given) is None


# ---- updates ----


@pytest.mark.parametrize("how", ["the answer says no", "it raises", "files change under it"])
def test_an_update_that_fails_leaves_weights_that_nobody_shares(
    how: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = updates(model, monkeypatch)

    def original(self: Any, recv_req: Any) -> Any:
        if how == "it raises":
            raise ValueError("shapes differ")
        if how == "files change under it":
            (model / "model.safetensors").write_bytes(b"others")
        return SimpleNamespace(success=how == "files change under it")

    request = SimpleNamespace(model_path=str(model), load_format="safetensors")
    with contextlib.suppress(ValueError):
        sharing.weights_from_disk(original, None, request)
    assert len(changes) == 2
    assert len(changes[1]) == 32
    assert changes[1] != changes[0]


def test_weights_are_those_of_the_start_only_where_they_were_loaded_in_the_same_way(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that began with dummy weights, and gets those that lie next to its configuration, finds no old page."""

    def named(before: str, after: str) -> bytes:
        changes = updates(model, monkeypatch, before)
        request = SimpleNamespace(model_path=str(model), load_format=after)
        sharing.weights_from_disk(lambda self, recv_req: SimpleNamespace(success=True), None, request)
        assert len(changes) == 1
        return changes[0]

    assert named("auto", "auto") == b""
    assert b"" not in (named("dummy", "auto"), named("auto", "dummy"), named("dummy", "dummy"))
    assert named("dummy", "auto") != named("auto", "dummy")


def updates(model: Path, monkeypatch: pytest.MonkeyPatch, load_format: str = "auto") -> list[bytes]:
    """What the space of an engine hears of its weights."""
    changes: list[bytes] = []
    known = {"weights": identity.weights_digest(str(model)), "load_format": load_format}
    monkeypatch.setattr(sharing.session, "current", lambda: SimpleNamespace(facts=known))
    monkeypatch.setattr(sharing, "bank_spaces", lambda: [SimpleNamespace(weights_changed=changes.append)])
    return changes
