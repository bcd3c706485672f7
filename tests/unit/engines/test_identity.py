"""What makes two engines' pages equal, and what an update of the weights does to that."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
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
    with pytest.raises(identity.Unidentified, match="no weight files"):
        identity.weights_digest(str(tmp_path))


def test_files_that_change_while_they_are_loaded_are_shared_with_nobody(model: Path) -> None:
    def look_up() -> dict[str, Any]:
        return {"weights": identity.weights_digest(str(model))}

    active: Any = SimpleNamespace(facts=look_up(), look_up_facts=look_up)
    assert identity.is_settled(active)
    (model / "model.safetensors").write_bytes(b"new")
    assert not identity.is_settled(active)
    assert active.facts is None


@pytest.fixture
def notes() -> list[str]:
    """Why pages are not shared."""
    return []


@pytest.fixture
def facts(model: Path, notes: list[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """What pages of an engine with the model depend on; `changes` of its settings."""
    monkeypatch.setattr(identity.versions, "installed", lambda: "0.5.23")
    monkeypatch.setattr(identity.session, "current", lambda: SimpleNamespace(notes=notes))

    def facts(tag: str = "", **changes: Any) -> Any:
        settings = dict.fromkeys(identity._SETTINGS, None)
        record = {**settings, "model_path": str(model), "load_format": "auto", "random_seed": 1, **changes}
        return identity.facts(SimpleNamespace(**record), tag)

    return facts


def test_facts_name_what_a_page_depends_on(facts: Callable[..., Any]) -> None:
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
        {"trust_remote_code": True},
        {"enable_deterministic_inference": True},
        {"speculative_draft_window_size": 512},
    ):
        assert facts(**other) != facts()
    assert facts(load_format="dummy", random_seed=2) != facts(load_format="dummy", random_seed=1)


@pytest.mark.parametrize("form", ["{}", "name={}", "mapping", "one mapping for all"])
def test_an_adapter_that_is_trained_again_under_its_name_shares_nothing(
    form: str, facts: Callable[..., Any], tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"one")
    given: Any = [form.format(adapter)]
    if form == "mapping":
        given = [{"lora_name": "name", "lora_path": str(adapter)}]
    elif form == "one mapping for all":
        given = {"name": str(adapter)}

    before = facts(lora_paths=given)
    assert before == facts(lora_paths=given)
    assert before != facts()
    (adapter / "adapter_model.safetensors").write_bytes(b"two")
    assert facts(lora_paths=given) != before
    (adapter / "adapter_model.safetensors").unlink()
    assert facts(lora_paths=given) is None


@pytest.mark.parametrize("where", ["modeling_x.py", "layers/attention.py"])
def test_other_code_in_a_models_folder_shares_nothing(where: str, model: Path, facts: Callable[..., Any]) -> None:
    """With --trust-remote-code it computes the pages. Time stamps say nothing: each clone has its own."""
    code = model / where
    code.parent.mkdir(exist_ok=True)
    code.write_text("scale = 1")
    before = facts()
    os.utime(code, (1, 1))
    assert facts() == before
    code.write_text("scale = 2")
    assert facts() != before
    code.write_text("scale = 1")
    assert facts() == before
    code.rename(code.with_name("renamed.py"))
    assert facts() != before


def downloaded(cache: Path, name: str, file: str, content: str) -> None:
    """A repository as Hugging Face's client keeps it."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text("0" * 40)
    folder = repository / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(content)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of what Hugging Face's client has downloaded, empty."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    return folder


def test_code_of_another_repository_that_a_model_runs_counts(
    model: Path, hub: Path, facts: Callable[..., Any], notes: list[str]
) -> None:
    references = '{"AutoModel": "owner/code--modeling.Model", "AutoTokenizer": ["owner/code--slow.Slow", null]}'
    (model / "config.json").write_text(f'{{"auto_map": {references}}}')
    assert facts() is not None  # it is not run
    assert facts(trust_remote_code=True) is None
    assert "owner/code" in notes[-1]
    downloaded(hub, "owner/code", "modeling.py", "scale = 1")
    before = facts(trust_remote_code=True)
    assert before is not None
    downloaded(hub, "owner/code", "modeling.py", "scale = 2")
    assert facts(trust_remote_code=True) not in (None, before)


def test_models_of_an_external_package_count(
    tmp_path: Path, facts: Callable[..., Any], notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without = facts()
    monkeypatch.setenv("SGLANG_EXTERNAL_MODEL_PACKAGE", "package_of_models")
    assert facts() is None
    assert "package_of_models" in notes[-1]
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "package_of_models"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "model.py").write_text("scale = 1")
    before = facts()
    assert before not in (None, without)
    (package / "model.py").write_text("scale = 2")
    assert facts() not in (None, without, before)


def test_weights_in_a_folder_of_their_own_are_those_that_count(
    hub: Path, tmp_path: Path, facts: Callable[..., Any], notes: list[str]
) -> None:
    own = tmp_path / "own"
    given = {"model_path": "owner/model", "download_dir": str(own)}
    downloaded(hub, "owner/model", "model.safetensors", "old")
    assert facts(**given) is None
    downloaded(own, "owner/model", "model.safetensors", "new")
    before = facts(**given)
    assert before is not None
    downloaded(hub, "owner/model", "config.json", '{"rope_theta": 2e6}')  # the configuration stays there
    assert facts(**given) not in (None, before)
    before = facts(**given)
    downloaded(own, "owner/model", "model.safetensors", "newer")
    assert facts(**given) not in (None, before)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"load_format": "remote_instance"}, "--load-format remote_instance"),
        ({"weight_cache_mode": "client"}, "older than their files"),
        ({"forward_hooks": [{"name": "scale"}]}, "--forward-hooks"),
    ],
)
def test_what_no_file_names_is_shared_with_nobody(
    given: dict[str, Any], why: str, facts: Callable[..., Any], notes: list[str]
) -> None:
    assert facts(weight_cache_mode="off", forward_hooks=None) is not None
    assert facts(**given) is None
    assert why in notes[-1]


def test_a_name_of_modelscope_is_not_looked_up_elsewhere(
    hub: Path, facts: Callable[..., Any], notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    downloaded(hub, "owner/model", "model.safetensors", "another model")
    assert facts(model_path="owner/model") is not None
    monkeypatch.setenv("SGLANG_USE_MODELSCOPE", "true")
    assert facts(model_path="owner/model") is None
    assert "ModelScope" in notes[-1]


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
    """An engine that started with dummy weights, and loads those next to its configuration, finds no old page."""

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
    """The names of weights that an engine's space gets."""
    changes: list[bytes] = []
    known = {"weights": identity.weights_digest(str(model)), "load_format": load_format}
    monkeypatch.setattr(sharing.session, "current", lambda: SimpleNamespace(facts=known))
    monkeypatch.setattr(sharing, "bank_spaces", lambda: [SimpleNamespace(weights_changed=changes.append)])
    return changes
