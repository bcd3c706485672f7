"""What is patched in SGLang and what is not, and how a SGLang that does not fit is refused.

Run as a script (`test_hooks.py MODEL_DIRECTORY REPORT_DIRECTORY [SCENARIO ...]`), this file imports SGLang once and
plays each of SCENARIOS in a fork of its own, where it may patch SGLang and end the process. The tests read the reports.
"""

from __future__ import annotations

import argparse
import base64
import functools
import importlib
import importlib.metadata
import inspect
import json
import logging
import os
import pickle
import pkgutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import pytest

from sglang_xmem.engines.sglang import hooks, install, launcher, versions
from sglang_xmem.engines.sglang.hooks import Hook
from sglang_xmem.errors import UnsupportedSGLang
from sglang_xmem.plan import Plan
from sglang_xmem.tiers import Ranks

TABLE = versions.current()
ALL_HOOKS = (*TABLE.flag_hooks, *TABLE.launcher_hooks, *TABLE.scheduler_hooks)
KEYWORDS = {"hicache_use_xmem": True, "hicache_xmem_tier": "dram", "hicache_xmem_config": {"dram": {"threads": 2}}}
UNKNOWN_VERSION = "0.5.20"
#: What HiCache is made of.
HICACHE = tuple(
    f"sglang.srt.{name}"
    for name in (
        "mem_cache.pool_host.base",
        "mem_cache.pool_host.common",
        "mem_cache.pool_host.mha",
        "mem_cache.l2_transfer",
        "mem_cache.hybrid_cache.host_pool_config",
        "mem_cache.hybrid_cache.hybrid_cache_controller",
        "mem_cache.hybrid_cache.hybrid_pool_assembler",
        "mem_cache.hicache_auto_size",
        "mem_cache.kv_cache_builder",
        "mem_cache.pool_host.group",
        "mem_cache.unified_radix_cache",
        "managers.cache_controller",
    )
)

# ---- in forks of the script ----

_model = ""


def _identities() -> dict[str, Any]:
    """Every function and class in HiCache's modules, and everything in those classes, by where it is found."""
    found: dict[str, Any] = {}
    for module in map(importlib.import_module, HICACHE):
        for name, value in vars(module).items():
            if inspect.isfunction(value) or inspect.isclass(value):
                found[f"{module.__name__}.{name}"] = value
            if inspect.isclass(value) and value.__module__.startswith("sglang."):
                found |= {f"{module.__name__}.{name}.{key}": member for key, member in vars(value).items()}
    return found


def _changed(before: dict[str, Any]) -> list[str]:
    after = _identities()
    return sorted(key for key in before.keys() | after.keys() if before.get(key) is not after.get(key))


def _load_plugins() -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()


def _engine_class() -> Any:
    return importlib.import_module("sglang.srt.entrypoints.engine").Engine


def _options(**more: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"model_path": _model, "device": "cpu", "attention_backend": "torch_native"}
    return {**options, "skip_tokenizer_init": True, "enable_hierarchical_cache": True, "page_size": 16, **more}


def _keyword_record(**more: Any) -> Any:
    """A record as sgl.Engine makes it."""
    record = _engine_class().server_args_class(**_options(**more))
    record.resolve_once()
    return record


def _command_record(*flags: str) -> Any:
    """A record as the commands make it."""
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    command = ["--model-path", _model, "--device", "cpu", "--attention-backend", "torch_native"]
    command += ["--skip-tokenizer-init", "--enable-hierarchical-cache", "--page-size", "16", *flags]
    record = ServerArgs.from_cli_args(parser.parse_args(command))
    record.resolve_once()
    return record


def _publish(record: Any) -> None:
    """The first thing that a scheduler does with the record that it was sent."""
    from sglang.srt import runtime_context

    sent = pickle.loads(pickle.dumps(record))
    runtime_context.publish(sent, role="scheduler", ranks=runtime_context.SpawnRanks(world_rank=0))


def _pretend_version(version: str) -> None:
    real = importlib.metadata.version

    def pretended(distribution_name: str) -> str:
        return version if distribution_name == "sglang" else real(distribution_name)

    importlib.metadata.version = pretended


def _message(call: Callable[[], Any]) -> list[str]:
    """Type and text of what `call` raises."""
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []


def flag_off() -> Any:
    before = _identities()
    _load_plugins()
    record = _keyword_record()
    record.check_server_args()
    _publish(record)
    return {"changed": _changed(before), "compared": len(before), "attached": hasattr(record, "_sglang_xmem")}


def _depth(target: str) -> int:
    """How many decorators a function has that say so."""
    function, depth = pkgutil.resolve_name(target), 0
    while hasattr(function, "__wrapped__"):
        function, depth = function.__wrapped__, depth + 1
    return depth


def flag_on() -> Any:
    before = _identities()
    own = {hook.target: _depth(hook.target) for hook in ALL_HOOKS}
    _load_plugins()
    _keyword_record(**KEYWORDS).check_server_args()
    in_launcher = _changed(before)
    for _ in range(2):  # as with two engines in one process
        record = _keyword_record(**KEYWORDS)
        record.check_server_args()
        _publish(record)
        hooks.verify(ALL_HOOKS)
    wrappers = {target: _depth(target) - depth for target, depth in own.items()}
    return {"in_launcher": in_launcher, "changed": _changed(before), "wrappers": wrappers}


def targets() -> Any:
    return {hook.target: list(inspect.signature(pkgutil.resolve_name(hook.target)).parameters) for hook in ALL_HOOKS}


def _unknown_version(*argv: str) -> None:
    _pretend_version(UNKNOWN_VERSION)
    sys.argv = ["launch_server", "--model-path", _model, *argv]
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logger = logging.getLogger("sglang_xmem")
    logger.addHandler(handler)
    logger.propagate = False
    _load_plugins()


def unknown_version_with_the_flag() -> None:
    _unknown_version("--hicache-use-xmem")


def unknown_version_with_another_flag() -> None:
    _unknown_version("--hicache-xmem-tier=dram")


def unknown_version_without_the_flag() -> Any:
    from sglang.srt.server_args import ServerArgs

    before, flags = _identities(), ServerArgs.add_cli_args
    _unknown_version("--enable-hierarchical-cache")
    return {"changed": _changed(before), "same_flags": ServerArgs.add_cli_args == flags}


def _engine_keywords(**keywords: Any) -> Any:
    """What Engine(**keywords) makes of its keywords, or how it fails."""
    engine = _engine_class()
    seen: list[Any] = []

    class Stop(Exception):
        pass

    def stop(**kwargs: Any) -> NoReturn:
        seen.append(sorted(kwargs))
        raise Stop

    engine.server_args_class.original = stop  # behind the guard
    failure = _message(lambda: engine(**keywords))
    return {"keywords": seen[0] if seen else None, "failure": None if failure[:1] == ["Stop"] else failure}


def unknown_version_second_engine() -> Any:
    _unknown_version()
    on = _message(lambda: _engine_class()(model_path=_model, **KEYWORDS))
    return {"on": on, "off": _engine_keywords(model_path=_model, **{**KEYWORDS, "hicache_use_xmem": False})}


def unknown_version_first_engine() -> Any:
    _pretend_version(UNKNOWN_VERSION)  # plugins load inside of Engine()
    return _message(lambda: _engine_class()(model_path=_model, **KEYWORDS))


def _remove_a_pool_target() -> None:
    from sglang.srt.mem_cache.l2_transfer import L2TransferEngine

    del L2TransferEngine.submit_host_to_device


def _change_a_pool_target() -> None:
    from sglang.srt.managers.cache_controller import HiCacheController

    def move_indices(self: Any, operation: Any) -> Any: ...

    HiCacheController.move_indices = move_indices


def removed_target_of_a_command() -> None:
    _load_plugins()
    _remove_a_pool_target()
    _command_record("--hicache-use-xmem", "--hicache-xmem-tier", "dram").check_server_args()


def changed_target_of_a_command() -> None:
    _load_plugins()
    _change_a_pool_target()
    _command_record("--hicache-use-xmem", "--hicache-xmem-tier", "dram").check_server_args()


def removed_target_of_an_engine() -> Any:
    _load_plugins()
    _remove_a_pool_target()
    return _message(_keyword_record(**KEYWORDS).check_server_args)


def removed_target_with_the_flag_off() -> None:
    _load_plugins()
    _remove_a_pool_target()
    for record in (_keyword_record(), _command_record()):
        record.check_server_args()
        _publish(record)


def removed_target_in_a_scheduler() -> None:
    _load_plugins()
    record = _keyword_record(**KEYWORDS)
    record.check_server_args()
    _remove_a_pool_target()
    _publish(record)


def target_of_another_plugin_in_a_scheduler() -> Any:
    """SGLang's registry patches a target once, and skips later hooks; here both hooks run."""
    from sglang.srt.mem_cache.l2_transfer import L2TransferEngine
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    _load_plugins()
    record = _keyword_record(**KEYWORDS)
    record.check_server_args()
    seen: list[str] = []
    target = "sglang.srt.mem_cache.l2_transfer.L2TransferEngine.__init__"
    HookRegistry.register(target, lambda result, self, io_backend: seen.append(io_backend), HookType.AFTER)
    HookRegistry.apply_hooks()
    _publish(record)
    L2TransferEngine("kernel")
    function: Any = L2TransferEngine.__init__
    both = hasattr(function.__wrapped__, "__wrapped__")
    return {"seen": seen, "both": both}


def hooks_of_a_later_plugin() -> Any:
    """A plugin that SGLang finds behind this one hooks what this one hooks, with the flag off."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.server_args import ServerArgs

    from sglang_xmem import plugin

    seen = []
    plugin.register()
    for name in ("add_cli_args", "from_cli_args", "check_server_args"):
        HookRegistry.register(
            f"sglang.srt.server_args.ServerArgs.{name}",
            lambda result, *args, _name=name: seen.append(_name),
            HookType.AFTER,
        )
    HookRegistry.apply_hooks()
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    ServerArgs.from_cli_args(parser.parse_args(["--model-path", _model, "--device", "cpu"]))
    return {"seen": seen, "ours": "--hicache-use-xmem" in parser.format_help()}


def switch_in_a_config_file() -> Any:
    """A --config file spells booleans out, and drops a false store_true."""
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger

    _load_plugins()
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    found = {}
    for text in (
        "hicache-use-xmem: false\nhicache-xmem-tier: dram\n",
        "no-hicache-use-xmem: true\nhicache-xmem-tier: dram\n",
        "hicache-use-xmem: true\nhicache-xmem-tier: dram\n",
    ):
        path = Path(_model) / "config.yaml"
        path.write_text(f"model-path: {_model}\ndevice: cpu\n{text}")
        merged = ConfigArgumentMerger(parser).merge_config_with_args(["--config", str(path)])
        record = ServerArgs.from_cli_args(parser.parse_args(merged))
        found[text.splitlines()[0]] = hasattr(record, "_sglang_xmem")
    return found


def unplanned_record_in_a_scheduler() -> None:
    _load_plugins()
    _publish(_keyword_record(**KEYWORDS))


def keywords() -> Any:
    _load_plugins()
    factory = _engine_class().server_args_class
    install()
    record = _keyword_record(**KEYWORDS)
    sent = [pickle.loads(pickle.dumps(record))._sglang_xmem]
    asked = record._sglang_xmem
    record.check_server_args()
    sent.append(pickle.loads(pickle.dumps(record))._sglang_xmem)

    class Fork(_engine_class()):  # type: ignore[misc]
        """A third-party engine."""

    # SGLang's is in a module that needs Ray.
    ray_engine: Any = type("RayEngine", (_engine_class(),), {"__module__": "sglang.srt.ray.engine"})
    own_ray_engine: Any = type("OwnRayEngine", (ray_engine,), {"__module__": "third_party.engine"})

    return {
        "request": [asked.tier, asked.config, asked.from_cli],
        "planned": type(record._sglang_xmem).__name__,
        "equal after pickling": [sent[0] == asked, sent[1] == record._sglang_xmem],
        "plan": base64.b64encode(pickle.dumps(record._sglang_xmem)).decode(),
        "off": [
            hasattr(_keyword_record(**more), "_sglang_xmem")
            for more in ({}, {"hicache_use_xmem": False}, {"hicache_use_xmem": False, "hicache_xmem_tier": "dram"})
        ],
        "subclass": Fork.server_args_class(**_options(**KEYWORDS))._sglang_xmem == asked,
        "ray": [
            _message(functools.partial(e.server_args_class, **_options(**KEYWORDS)))
            for e in (ray_engine, own_ray_engine)
        ],
        "ray without": hasattr(ray_engine.server_args_class(**_options()), "_sglang_xmem"),
        "wrapped once": _engine_class().server_args_class is factory,
        "wrong types": [_message(functools.partial(factory, **_options(hicache_use_xmem=on))) for on in ("yes", 1)],
        "without the switch": [
            _message(functools.partial(factory, **_options(**{name: KEYWORDS[name]})))
            for name in ("hicache_xmem_tier", "hicache_xmem_config")
        ],
        "unknown keyword": _message(lambda: factory(**_options(**KEYWORDS, hicache_xmem_teir="dram"))),
    }


def tier_without_the_switch() -> None:
    _load_plugins()
    _command_record("--hicache-xmem-tier", "peer")


def flags() -> Any:
    _load_plugins()
    on = _command_record("--hicache-use-xmem", "--hicache-xmem-config", '{"dram": {}}')
    request = pickle.loads(pickle.dumps(on))._sglang_xmem
    return {
        "request": [request.tier, request.config, request.from_cli],
        "off": [
            hasattr(_command_record(*given), "_sglang_xmem")
            for given in (
                (),
                ("--hicache-use-xmem", "--no-hicache-use-xmem"),
                ("--no-hicache-use-xmem", "--hicache-xmem-tier", "dram"),
            )
        ],
    }


SCENARIOS: tuple[Callable[[], Any], ...] = (
    flag_off,
    flag_on,
    targets,
    unknown_version_with_the_flag,
    unknown_version_with_another_flag,
    unknown_version_without_the_flag,
    unknown_version_second_engine,
    unknown_version_first_engine,
    removed_target_of_a_command,
    changed_target_of_a_command,
    removed_target_of_an_engine,
    removed_target_with_the_flag_off,
    removed_target_in_a_scheduler,
    target_of_another_plugin_in_a_scheduler,
    hooks_of_a_later_plugin,
    switch_in_a_config_file,
    unplanned_record_in_a_scheduler,
    keywords,
    tier_without_the_switch,
    flags,
)


def _play(scenario: Callable[[], Any], directory: Path) -> NoReturn:
    """In the fork: the scenario's value to NAME.json, what it says to NAME.err, its status to the parent."""
    name = scenario.__name__
    error = os.open(directory / f"{name}.err", os.O_WRONLY | os.O_CREAT)
    os.dup2(error, 2)
    status = 1
    try:
        (directory / f"{name}.json").write_text(json.dumps(scenario()))
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)


def _play_all(model: str, directory: Path, *names: str) -> None:
    global _model
    _model = model
    for module in ("launch_server", "srt.entrypoints.engine", "srt.managers.scheduler"):
        importlib.import_module(f"sglang.{module}")
    _identities()
    statuses = {}
    for scenario in SCENARIOS:
        if names and scenario.__name__ not in names:
            continue
        pid = os.fork()
        if pid == 0:
            _play(scenario, directory)
        statuses[scenario.__name__] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    (directory / "statuses.json").write_text(json.dumps(statuses))


# ---- in pytest's process ----


class Report(NamedTuple):
    """How a scenario ended."""

    status: int
    stderr: str
    value: Any

    @property
    def said(self) -> str:
        """The one line of this package on stderr, and that there is no traceback."""
        assert "Traceback" not in self.stderr, self.stderr
        lines = [line for line in self.stderr.splitlines() if "sglang_xmem: " in line]
        assert len(lines) == 1, self.stderr
        return lines[0]


CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}


def play(tmp_path_factory: pytest.TempPathFactory, *names: str, sglang: str = "") -> dict[str, Report]:
    """What came of scenarios (all, if none is named), with this package as the only plugin.

    Args:
        sglang: folder with another SGLang than the installed one.
    """
    model, directory = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("reports")
    (model / "config.json").write_text(json.dumps(CONFIG))  # enough for everything before the weights
    path = os.pathsep.join(filter(None, [sglang, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, __file__, str(model), str(directory), *names],
        env={**os.environ, "SGLANG_PLUGINS": "sglang_xmem", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,  # all of SGLang is imported, on a busy machine
        check=False,
    )
    assert done.returncode == 0, done.stderr
    statuses = json.loads((directory / "statuses.json").read_text())
    return {
        name: Report(
            status,
            (directory / f"{name}.err").read_text(),
            json.loads((directory / f"{name}.json").read_text()) if status == 0 else None,
        )
        for name, status in statuses.items()
    }


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    """What came of all scenarios."""
    return play(tmp_path_factory)


def value_of(report: Report) -> Any:
    assert report.status == 0, report.stderr
    return report.value


@pytest.mark.cpu_engine
def test_flag_off_leaves_hicache_as_it_is(reports: dict[str, Report]) -> None:
    value = value_of(reports["flag_off"])
    assert value["changed"] == []
    assert value["compared"] > 500
    assert value["attached"] is False


@pytest.mark.cpu_engine
def test_flag_on_patches_schedulers_alone_and_what_it_says(reports: dict[str, Report]) -> None:
    """Also the negative control of the test above: the same comparison sees every patch."""
    value = value_of(reports["flag_on"])
    assert value["in_launcher"] == []
    expected = {hook.target for hook in TABLE.scheduler_hooks if hook.target.startswith(HICACHE)}
    others = {hook.target for hook in TABLE.scheduler_hooks} - expected
    assert all(target.startswith("sglang.srt.managers.schedule") for target in others), "all but the scheduler's own"
    assert expected <= set(value["changed"])
    # The rest are other modules' names of the same functions.
    assert {name.rpartition(".")[2] for name in value["changed"]} == {name.rpartition(".")[2] for name in expected}
    assert set(value["wrappers"].values()) == {1}, "once, however many engines there are"


@pytest.mark.cpu_engine
def test_targets_are_there_with_their_parameters(reports: dict[str, Report]) -> None:
    assert value_of(reports["targets"]) == {hook.target: list(hook.parameters) for hook in ALL_HOOKS}


@pytest.mark.cpu_engine
@pytest.mark.parametrize("scenario", ["unknown_version_with_the_flag", "unknown_version_with_another_flag"])
def test_unknown_version_ends_a_command_with_the_flag(reports: dict[str, Report], scenario: str) -> None:
    report = reports[scenario]
    assert report.status == 2
    for word in ("--hicache-use-xmem", UNKNOWN_VERSION, *versions.known(), "pip install sglang=="):
        assert word in report.said
    assert "WARNING" not in report.said


@pytest.mark.cpu_engine
def test_unknown_version_only_warns_without_the_flag(reports: dict[str, Report]) -> None:
    report = reports["unknown_version_without_the_flag"]
    assert value_of(report) == {"changed": [], "same_flags": True}
    assert "WARNING" in report.said
    assert UNKNOWN_VERSION in report.said


def check_version_refusal(failure: list[str]) -> None:
    kind, message = failure
    assert kind == "RuntimeError"
    for word in ("sglang_xmem: ", "--hicache-use-xmem", UNKNOWN_VERSION, "pip install sglang=="):
        assert word in message


@pytest.mark.cpu_engine
def test_unknown_version_refuses_the_keyword(reports: dict[str, Report]) -> None:
    value = value_of(reports["unknown_version_second_engine"])
    check_version_refusal(value["on"])
    # Switched off, the keywords do no harm.
    assert value["off"]["failure"] is None
    assert {"model_path"} <= set(value["off"]["keywords"]) <= {"model_path", "log_level"}


@pytest.mark.cpu_engine
def test_unknown_version_refuses_the_keyword_of_the_first_engine(reports: dict[str, Report]) -> None:
    check_version_refusal(value_of(reports["unknown_version_first_engine"]))


@pytest.mark.cpu_engine
@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        ("removed_target_of_a_command", ["has no", "L2TransferEngine.submit_host_to_device", "load pages"]),
        ("removed_target_in_a_scheduler", ["has no", "L2TransferEngine.submit_host_to_device", "load pages"]),
        (
            "changed_target_of_a_command",
            [
                "move_indices",
                "(self, operation)",
                "(self, host_indices, device_indices)",
                "keep transfers from waiting",
            ],
        ),
        ("tier_without_the_switch", ["--hicache-xmem-tier peer has no effect without --hicache-use-xmem"]),
        ("unplanned_record_in_a_scheduler", ["--hicache-use-xmem", "Use sglang serve or sgl.Engine"]),
    ],
)
def test_sglang_that_does_not_fit_is_refused(reports: dict[str, Report], scenario: str, words: list[str]) -> None:
    report = reports[scenario]
    assert report.status == 78, report.stderr
    for word in words:
        assert word in report.said


@pytest.mark.cpu_engine
def test_other_plugins_hooks_stay_alive(reports: dict[str, Report]) -> None:
    """Whether they come before this package's, behind them, or with the flag off."""
    assert value_of(reports["target_of_another_plugin_in_a_scheduler"]) == {"seen": ["kernel"], "both": True}
    value = value_of(reports["hooks_of_a_later_plugin"])
    assert value["ours"] is True
    assert set(value["seen"]) >= {"add_cli_args", "from_cli_args"}


@pytest.mark.cpu_engine
def test_a_config_file_can_switch_on_and_off(reports: dict[str, Report]) -> None:
    assert value_of(reports["switch_in_a_config_file"]) == {
        "hicache-use-xmem: false": False,
        "no-hicache-use-xmem: true": False,
        "hicache-use-xmem: true": True,
    }


@pytest.mark.cpu_engine
def test_sglang_that_does_not_fit_is_an_error_of_the_engine(reports: dict[str, Report]) -> None:
    kind, message = value_of(reports["removed_target_of_an_engine"])
    assert kind == "UnsupportedSGLang"
    assert "L2TransferEngine.submit_host_to_device" in message
    assert "\n" not in message


@pytest.mark.cpu_engine
def test_sglang_that_does_not_fit_serves_with_the_flag_off(reports: dict[str, Report]) -> None:
    value_of(reports["removed_target_with_the_flag_off"])


@pytest.mark.cpu_engine
def test_keywords_of_the_engine(reports: dict[str, Report]) -> None:
    value = value_of(reports["keywords"])
    assert value["request"] == ["dram", KEYWORDS["hicache_xmem_config"], False]
    assert value["planned"] == "Plan"
    assert value["equal after pickling"] == [True, True]
    assert value["off"] == [False, False, False]
    assert value["subclass"] is True
    assert value["wrapped once"] is True
    for kind, message in value["ray"]:
        assert kind == "ConfigError"
        assert message.startswith("hicache_use_xmem=True does not work with RayEngine: ")
    assert value["ray without"] is False
    for (kind, message), given in zip(value["wrong types"], ("'yes'", "1"), strict=True):
        assert (kind, message) == ("ConfigError", f"hicache_use_xmem must be True or False, got {given}.")
    for (kind, message), name in zip(
        value["without the switch"], ("hicache_xmem_tier", "hicache_xmem_config"), strict=True
    ):
        assert kind == "ConfigError"
        assert message.startswith(f"{name}=")
        assert "has no effect without hicache_use_xmem=True" in message
    assert value["unknown keyword"][0] == "TypeError"
    assert "hicache_xmem_teir" in value["unknown keyword"][1]


@pytest.mark.cpu_engine
def test_a_plan_is_the_same_in_another_process(reports: dict[str, Report]) -> None:
    plan = pickle.loads(base64.b64decode(value_of(reports["keywords"])["plan"]))
    assert isinstance(plan, Plan)
    assert plan.ranks == Ranks(gpus=(None,))
    assert [candidate.tier for candidate in plan.candidates] == ["dram"]
    assert plan.options.tiers["dram"].threads == 2


@pytest.mark.cpu_engine
def test_flags_of_the_commands(reports: dict[str, Report]) -> None:
    value = value_of(reports["flags"])
    assert value["request"] == [None, '{"dram": {}}', True]
    assert value["off"] == [False, False, False]


# ---- without SGLang ----


class Target:
    """Something to patch."""

    def method(self, first: int, *, second: int = 0) -> int:
        return first + second


@pytest.fixture
def fake_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module in the place of SGLang."""
    module = ModuleType("fake_sglang_part")
    module.__dict__["Target"] = Target
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def hook(target: str, *parameters: str) -> Hook:
    return Hook(target, parameters, "after", "builtins:print", "hold the door")


def test_verify_takes_what_fits(fake_module: ModuleType) -> None:
    hooks.verify((hook("fake_sglang_part.Target.method", "self", "first", "second"),))


@pytest.mark.parametrize(
    ("target", "parameters"),
    [
        ("fake_sglang_part.Target.renamed", ("self",)),
        ("fake_sglang_part.Renamed.method", ("self",)),
        ("fake_sglang_part.moved.Target", ("self",)),
        ("no_such_sglang.Target", ()),
        ("fake_sglang_part.Target.method", ("self", "first")),
        ("fake_sglang_part.Target.method", ("self", "second", "first")),
        ("fake_sglang_part.Target.method", ("self", "first", "second", "third")),
    ],
)
def test_verify_names_what_does_not_fit(fake_module: ModuleType, target: str, parameters: tuple[str, ...]) -> None:
    fits = hook("fake_sglang_part.Target.method", "self", "first", "second")
    with pytest.raises(UnsupportedSGLang) as caught:
        hooks.verify((fits, hook(target, *parameters)))
    message = str(caught.value)
    assert target in message
    assert "hold the door" in message
    assert "\n" not in message
    if target.endswith("method") and "Renamed" not in target:
        assert "(self, first, second)" in message
        assert f"({', '.join(parameters)})" in message


def test_a_hook_that_sglang_does_not_place_is_an_error(
    monkeypatch: pytest.MonkeyPatch, fake_module: ModuleType
) -> None:
    """SGLang logs a failing hook and continues."""
    registry = ModuleType("sglang.srt.plugins.hook_registry")
    importlib.import_module(registry.__name__)  # else a half of SGLang stays behind, imported over this one
    lazy = SimpleNamespace(_apply_target=lambda target, hooks: None)
    registry.__dict__.update(HookRegistry=lazy, HookType=str)
    monkeypatch.setitem(sys.modules, registry.__name__, registry)
    with pytest.raises(UnsupportedSGLang, match=r"did not patch fake_sglang_part\.Target\.method, needed to hold the"):
        hooks.place((hook("fake_sglang_part.Target.method", "self", "first", "second"),))


class Scheduler:
    """A scheduler's process, as the launcher sees it."""

    def __init__(self, exitcode: int | None = None) -> None:
        self.exitcode = exitcode

    def is_alive(self) -> bool:
        return self.exitcode is None

    def kill(self) -> None:
        self.exitcode = -9


@contextmanager
def launching(monkeypatch: pytest.MonkeyPatch, on: bool) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(launcher, "_launching_with_tier", on)
        yield


def test_ranks_with_the_patches_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    infos = [{launcher.INFO_KEY: "dram"}, {launcher.INFO_KEY: ""}]
    with launching(monkeypatch, on=True):
        assert launcher.wait_for_scheduler_ready(lambda readers, processes: infos, [], []) is infos
    with launching(monkeypatch, on=False):
        assert launcher.wait_for_scheduler_ready(lambda readers, processes: [{}], [], []) == [{}]


def test_a_rank_without_the_patches_must_not_serve(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    processes = [Scheduler(), Scheduler()]
    infos: list[dict[str, str]] = [{launcher.INFO_KEY: "dram"}, {}]
    with launching(monkeypatch, on=True), pytest.raises(SystemExit, match="78"):
        launcher.wait_for_scheduler_ready(lambda readers, procs: infos, [], processes)
    assert "Rank 1 started without the hooks" in capsys.readouterr().err
    assert [process.exitcode for process in processes] == [-9, -9]


@pytest.mark.parametrize("version", versions.known())
def test_a_controller_that_cannot_report_is_believed(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """Up to 0.5.22 a data-parallel controller sends a fixed set of facts, and so nothing of the tier."""
    monkeypatch.setattr(versions, "installed", lambda: version)
    infos = [{"status": "ready", launcher.CONTROLLER_KEY: [1, 2]}]
    with launching(monkeypatch, on=True):
        if versions.load(version).controller_reports:
            with pytest.raises(SystemExit, match="78"):
                launcher.wait_for_scheduler_ready(lambda readers, procs: infos, [], [])
        else:
            assert launcher.wait_for_scheduler_ready(lambda readers, procs: infos, [], []) is infos


@pytest.mark.parametrize(("status", "refused"), [(78, True), (1, False), (-9, False)])
def test_a_refusal_is_told_from_a_crash(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: int, refused: bool
) -> None:
    def fail(readers: Any, processes: Any) -> NoReturn:
        raise RuntimeError("Initialization failed")

    processes = [Scheduler(), Scheduler(status)]
    expected: type[BaseException] = SystemExit if refused else RuntimeError
    with launching(monkeypatch, on=True), pytest.raises(expected):
        launcher.wait_for_scheduler_ready(fail, [], processes)
    assert ("A rank exited during startup" in capsys.readouterr().err) is refused
    assert processes[0].is_alive() is not refused


if __name__ == "__main__":
    _play_all(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
