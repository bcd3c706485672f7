"""What the bytes of a page depend on: names that are equal for two ranks exactly where their pages are.

SGLang's own keys of pages name tokens alone. Everything else that a page's bytes depend on goes into the identity of
the space that an engine joins in the page bank; whoever differs in any of it finds nothing. Where the weights cannot be
identified, the engine shares with nobody.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_xmem import session
from sglang_xmem.engines.sglang import storage, versions
from sglang_xmem.engines.sglang.geometry import Description, Section

if TYPE_CHECKING:
    from sglang_xmem.session import Session

logger = logging.getLogger(__name__)

#: Counts changes of what an identity is made of.
SCHEMA = 3
#: Files that weights are in.
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}
#: Host pools of latents and of their indexer, which are not split over attention heads.
_REPLICATED = {"MLATokenToKVPoolHost", "DSAIndexerPoolHost"}
_SAMPLES, _SAMPLE_BYTES = 16, 4096

#: ServerArgs that a page's bytes depend on, next to the model's own files.
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
    "model_impl",
    "model_config_parser",
    "model_loader_extra_config",
    "custom_weight_loader",
    "modelopt_quant",
    "quantize_and_serve",
    "rl_quant_profile",
    "kt_method",
    "kt_num_gpu_experts",
    "mamba_ssm_dtype",
)
#: ServerArgs that name a file, or weights that are used next to the model's.
_FILES = ("quantization_param_path", "decrypted_config_file")
_OTHER_WEIGHTS = ("kt_weight_path", "uno_lora_path")


class Unidentified(Exception):
    """Weights that look like others'; the message is a clause."""


def facts(server_args: Any, tag: str) -> dict[str, Any] | None:
    """What the pages of a model depend on, before its pools are known; None where that cannot be said.

    Args:
        server_args: SGLang's record.
        tag: the user's.
    """
    dummy = server_args.load_format == "dummy"  # weights are made from the configuration and the seed
    settings = {name: str(getattr(server_args, name, None)) for name in _SETTINGS}
    if dummy:
        settings["random_seed"] = str(server_args.random_seed)
    draft = getattr(server_args, "speculative_draft_model_path", None)
    try:
        weights = weights_digest(server_args.model_path, server_args.revision, has_weights=not dummy)
        if draft:
            settings["draft"] = weights_digest(draft, getattr(server_args, "speculative_draft_model_revision", None))
        for name in _FILES:
            if file := getattr(server_args, name, None):
                settings[f"{name}'s content"] = _digest_of(Path(file).read_bytes())
        for name in _OTHER_WEIGHTS:
            if path := getattr(server_args, name, None):
                settings[f"{name}'s content"] = weights_digest(path)
        # SGLang's keys of an adapter's pages know its name and path, which stay when it is trained again.
        for path in sorted(set(_adapters(getattr(server_args, "lora_paths", None)))):
            settings[f"adapter {path}"] = weights_digest(path)
    except (Unidentified, OSError) as error:
        session.current().notes.append(f"pages are not shared with other engines: {error}")
        return None
    version = versions.installed()
    return {"schema": SCHEMA, "format": storage.FORMAT, "sglang": version, "tag": tag, "weights": weights, **settings}


def _adapters(given: Any) -> list[str]:
    """Paths of what --lora-paths names: `PATH`, `NAME=PATH`, {"lora_path": PATH} or {NAME: PATH}."""
    if isinstance(given, Mapping):
        return [str(path) for path in given.values()]
    return [
        str(each["lora_path"]) if isinstance(each, Mapping) else str(getattr(each, "lora_path", each)).split("=", 1)[-1]
        for each in given or ()
    ]


def is_settled(active: Session) -> bool:
    """Whether pages can be shared: what they depend on is known, and did not change while the weights were loaded."""
    if active.facts is not None and active.look_up_facts() != active.facts:
        logger.warning("sglang_xmem: pages are not shared: files of the model changed while it was loaded. Restart.")
        active.facts = None
    return active.facts is not None


def weights_digest(model: str, revision: str | None = None, *, has_weights: bool = True) -> str:
    """A digest of a model's files: names, sizes, times, samples of the weights, and the whole of what is small.

    Args:
        has_weights: False: none of the files needs to be of weights.

    Raises:
        Unidentified: they are not on this machine.
    """
    path = Path(model)
    if not path.exists():
        path = _downloaded(model, revision)
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if _counts(file))
    if has_weights and not any(file.suffix in _WEIGHTS for file in files):
        raise Unidentified(f"{path} has no files of weights")
    digest = hashlib.sha256()
    for file in files:
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
    return digest.hexdigest()


def _counts(file: Path) -> bool:
    return file.suffix in _WEIGHTS or (file.suffix == ".json" and not file.name.startswith("tokenizer"))


def _downloaded(model: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except Exception as error:  # of many kinds, also where it names no repository
        raise Unidentified(f"the files of {model} are not found ({type(error).__name__})") from None


def _digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def of_space(
    known: Mapping[str, Any],
    placed: Mapping[str, Section],
    described: Sequence[tuple[str, Any, Description | None]],
    space: str,
) -> bytes:
    """32 bytes that are equal for two ranks exactly where a page of one is a page of the other.

    Args:
        known: `facts`.
        placed, described: pools of the rank and their places in a frame.
        space: whose pages.
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
    """Whether all ranks of tensor parallelism have the same bytes in these pools of one space."""
    return all(any(cls.__name__ in _REPLICATED for cls in type(pool).__mro__) for pool in pools)
