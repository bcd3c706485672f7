"""What the bytes of a page depend on: identities that are equal for two ranks if and only if their pages are equal.

SGLang's page keys depend only on tokens. Everything else that determines a page's bytes is part of the identity of the
space that an engine joins in the page bank; engines that differ in any of it share nothing. An engine whose weights
cannot be identified does not share.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_xmem import session
from sglang_xmem.engines.sglang import storage, versions
from sglang_xmem.engines.sglang.geometry import Description, Section

if TYPE_CHECKING:
    from sglang_xmem.session import Session

logger = logging.getLogger(__name__)

#: Version of the identity's composition.
SCHEMA = 4
#: Suffixes of weight files.
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}
#: Values of --load-format whose weights are not those of the model's files.
_FROM_ELSEWHERE = {"remote", "remote_instance", "rdma", "ipc_cache", "private"}
#: Names a package whose models SGLang uses instead of its own.
_MODEL_PACKAGE = "SGLANG_EXTERNAL_MODEL_PACKAGE"
#: If set, a model that is not a path is not the one of that name on Hugging Face.
_MODELSCOPE = "SGLANG_USE_MODELSCOPE"
#: Host pools of latents and their indexer, which are not split over attention heads.
_REPLICATED = {"MLATokenToKVPoolHost", "DSAIndexerPoolHost"}
_SAMPLES, _SAMPLE_BYTES = 16, 4096

#: ServerArgs that determine a page's bytes, in addition to the model's files.
_SETTINGS = (
    "revision",
    "load_format",
    "quantization",
    "quantization_param_path",
    "dtype",
    "kv_cache_dtype",
    "json_model_override_args",
    "context_length",
    "page_size",
    "speculative_algorithm",
    "speculative_draft_model_path",
    "speculative_draft_model_revision",
    "speculative_draft_model_quantization",
    "speculative_draft_load_format",
    "speculative_draft_kv_cache_dtype",
    "speculative_draft_window_size",
    "speculative_draft_sink_size",
    "model_impl",
    "trust_remote_code",
    "model_config_parser",
    "model_loader_extra_config",
    "custom_weight_loader",
    "modelopt_quant",
    "quantize_and_serve",
    "rl_quant_profile",
    "kt_method",
    "kt_num_gpu_experts",
    "mamba_ssm_dtype",
    # An engine with deterministic output must not find pages of engines without it.
    "enable_deterministic_inference",
    "rl_on_policy_target",
)
#: ServerArgs that name a file, or additional weights.
_FILES = ("quantization_param_path", "decrypted_config_file", "decrypted_draft_config_file")
_OTHER_WEIGHTS = ("kt_weight_path", "uno_lora_path", "modelopt_checkpoint_restore_path")


class Unidentified(Exception):
    """Weights or code cannot be identified; the message is a clause."""


def facts(server_args: Any, tag: str) -> dict[str, Any] | None:
    """Collect what a model's pages depend on, before its pools are known; None if that is unknown.

    Args:
        server_args: SGLang's record.
        tag: the user's `bank.tag`.
    """
    dummy = server_args.load_format == "dummy"  # weights are made from the configuration and the seed
    settings = {name: str(getattr(server_args, name, None)) for name in _SETTINGS}
    if dummy:
        settings["random_seed"] = str(server_args.random_seed)
    try:
        _refuse_what_is_not_in_files(server_args)
        folder = getattr(server_args, "download_dir", None)
        models = {"weights": (server_args.model_path, server_args.revision, not dummy)}
        if draft := getattr(server_args, "speculative_draft_model_path", None):
            models["draft"] = (draft, getattr(server_args, "speculative_draft_model_revision", None), True)
        for name, (model, revision, has_weights) in models.items():
            settings[name] = weights_digest(model, revision, has_weights=has_weights, download_dir=folder)
            if getattr(server_args, "trust_remote_code", False):
                settings |= _code_elsewhere(_folder_of(model, revision))
        settings |= _model_package()
        for name in _FILES:
            if file := getattr(server_args, name, None):
                settings[f"{name}'s content"] = _digest_of(Path(file).read_bytes())
        for name in _OTHER_WEIGHTS:
            if path := getattr(server_args, name, None):
                settings[f"{name}'s content"] = weights_digest(path)
        # SGLang's keys of an adapter's pages contain its name and path, which do not change when it is retrained.
        for path in sorted(set(_adapters(getattr(server_args, "lora_paths", None)))):
            settings[f"adapter {path}"] = weights_digest(path)
    except (Unidentified, OSError, ValueError) as error:
        session.current().notes.append(f"pages are not shared with other engines: {error}")
        return None
    version = versions.installed()
    return {"schema": SCHEMA, "format": storage.FORMAT, "sglang": version, "tag": tag, **settings}


def _refuse_what_is_not_in_files(server_args: Any) -> None:
    """Raise Unidentified if this machine's files do not determine what the model computes."""
    if server_args.load_format in _FROM_ELSEWHERE:
        raise Unidentified(f"weights of --load-format {server_args.load_format} come from elsewhere")
    if getattr(server_args, "weight_cache_mode", None) not in (None, "off"):
        raise Unidentified("cached weights may be older than their files")
    if getattr(server_args, "forward_hooks", None):
        raise Unidentified("--forward-hooks may change what the model computes")


def _code_elsewhere(folder: Path) -> dict[str, str]:
    """Digest the code in other repositories that a model's configuration names, as `OWNER/NAME--MODULE.CLASS`."""
    config = folder / "config.json"
    named = json.loads(config.read_text()).get("auto_map") if config.is_file() else None
    repositories = sorted(set(re.findall(r'"([\w.-]+/[\w.-]+?)--', json.dumps(named))))
    return {f"code of {name}": code_digest(_folder_of(name)) for name in repositories}


def _model_package() -> dict[str, str]:
    name = os.environ.get(_MODEL_PACKAGE)
    if not name:
        return {}
    try:
        spec = importlib.util.find_spec(name)
    except ImportError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise Unidentified(f"{_MODEL_PACKAGE}={name} is not a package")
    return {"model package": " ".join([name, *(code_digest(Path(path)) for path in spec.submodule_search_locations)])}


def _adapters(given: Any) -> list[str]:
    """Return the paths in --lora-paths: `PATH`, `NAME=PATH`, {"lora_path": PATH} or {NAME: PATH}."""
    if isinstance(given, Mapping):
        return [str(path) for path in given.values()]
    return [
        str(each["lora_path"]) if isinstance(each, Mapping) else str(getattr(each, "lora_path", each)).split("=", 1)[-1]
        for each in given or ()
    ]


def is_settled(active: Session) -> bool:
    """Whether pages can be shared: their dependencies are known, and did not change while the weights were loaded."""
    if active.facts is not None and active.look_up_facts() != active.facts:
        logger.warning(
            "sglang_xmem: pages are not shared: the model's files changed during loading. Restart the engine."
        )
        active.facts = None
    return active.facts is not None


def weights_digest(
    model: str, revision: str | None = None, *, has_weights: bool = True, download_dir: str | None = None
) -> str:
    """Digest a model's files: names, sizes, times, samples of the weights, and small files entirely.

    Includes the model's code, which SGLang runs with --trust-remote-code.

    Args:
        has_weights: False: weight files may be missing.
        download_dir: SGLang's folder for downloaded weights; their configuration is in the default cache.

    Raises:
        Unidentified: the files are not on this machine.
    """
    path = _folder_of(model, revision)
    folders = [path]
    if download_dir and not Path(model).exists():
        folders.append(_downloaded(model, revision, download_dir))
    if has_weights and not any(file.suffix in _WEIGHTS for file in _files(folders[-1])):
        raise Unidentified(f"{folders[-1]} has no weight files")
    digest = hashlib.sha256()
    for folder in folders:
        for file in _files(folder):
            with file.open("rb") as content:
                status = os.fstat(content.fileno())
                digest.update(repr((file.name, status.st_size)).encode())
                if file.suffix == ".json":
                    digest.update(content.read())
                    continue
                digest.update(repr(status.st_mtime_ns).encode())
                for number in range(_SAMPLES):
                    content.seek(max(0, status.st_size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
                    digest.update(content.read(_SAMPLE_BYTES))
        digest.update(code_digest(folder).encode())
    return digest.hexdigest()


def _files(path: Path) -> list[Path]:
    """Return the weight files and the configuration files, by suffix."""
    return [path] if path.is_file() else sorted(file for file in path.iterdir() if _counts(file))


def _counts(file: Path) -> bool:
    return file.suffix in _WEIGHTS or (file.suffix == ".json" and not file.name.startswith("tokenizer"))


def code_digest(folder: Path) -> str:
    """Digest all Python files below a folder; a file has none."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        content = file.read_bytes()
        digest.update(repr((file.relative_to(folder).as_posix(), len(content))).encode())
        digest.update(content)
    return digest.hexdigest()


def _folder_of(model: str, revision: str | None = None) -> Path:
    return path if (path := Path(model)).exists() else _downloaded(model, revision)


def _downloaded(model: str, revision: str | None, cache_dir: str | None = None) -> Path:
    if os.environ.get(_MODELSCOPE, "").lower() in ("1", "true"):
        raise Unidentified(f"{model} comes from ModelScope")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, revision=revision, cache_dir=cache_dir, local_files_only=True))
    except Exception as error:  # of many classes, also for a name that is not a repository
        raise Unidentified(f"the files of {model} are not found ({type(error).__name__})") from None


def _digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def of_space(
    known: Mapping[str, Any],
    placed: Mapping[str, Section],
    described: Sequence[tuple[str, Any, Description | None]],
    space: str,
) -> bytes:
    """Return 32 bytes that are equal for two ranks if and only if their pages are interchangeable.

    Args:
        known: `facts`.
        placed, described: pools of the rank and their sections in a frame.
        space: the index space.
    """
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    replicated = is_replicated(pool for name, pool, _ in described if name in placed and placed[name].space == space)
    ranks = {
        "tp": [0 if replicated else parallel.attn_tp_rank, parallel.attn_tp_size],
        "pp": [parallel.pp_rank, parallel.pp_size],
        "cp": [parallel.attn_cp_rank, parallel.attn_cp_size],
    }
    pools = {
        name: {
            "class": type(pool).__name__,
            "dtype": str(pool.dtype),
            "section": list(placed[name]),
            "slots": description.slots,
            "units": [[(layer, unit.unit_bytes) for layer, unit in part] for part in description.components],
        }
        for name, pool, description in described
        if description is not None
    }
    whole = {**known, "ranks": ranks, "pools": pools, "order": list(pools), "space": space}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).digest()


def is_replicated(pools: Iterable[Any]) -> bool:
    """Whether all ranks of tensor parallelism have equal bytes in these pools of one space."""
    return all(any(cls.__name__ in _REPLICATED for cls in type(pool).__mro__) for pool in pools)
