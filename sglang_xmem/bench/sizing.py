"""How much KV cache a workload needs and a pool holds, by SGLang's own arithmetic; what cannot fit is refused.

Sources, SGLang 0.5.23: bytes of a token, mem_cache/pool_host/mha.py (get_size_per_token); pool size,
mem_cache/pool_host/base.py (HostKVCache.__init__, --hicache-size in units of 1e9 bytes, one padding page);
host memory, the same file (HICACHE_HOST_MEMORY_RESERVE_BYTES) and mem_cache/host_memory.py.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sglang_xmem.engines.sglang.host_budget import fallback_host_budget, launcher_host_budget
from sglang_xmem.errors import ConfigError


@dataclass(frozen=True)
class KVShape:
    """What decides a token's bytes of KV cache."""

    layers: int
    kv_heads: int
    head_dim: int
    itemsize: int
    tp_size: int = 1

    @staticmethod
    def of(config: dict[str, Any], tp_size: int = 1, kv_cache_dtype: str = "auto") -> KVShape:
        """Of a model's config.json; `kv_cache_dtype` as SGLang's option of that name."""
        dtype = str(config.get("torch_dtype") or config.get("dtype") or "bfloat16")
        itemsize = (
            1 if kv_cache_dtype.startswith("fp8") else 4 if kv_cache_dtype == "auto" and "float32" in dtype else 2
        )
        heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        return KVShape(config["num_hidden_layers"], heads, dim, itemsize, tp_size)

    @property
    def rank_bytes(self) -> int:
        """Bytes of a token on one rank; heads are replicated where there are fewer than ranks."""
        return 2 * self.layers * max(1, self.kv_heads // self.tp_size) * self.head_dim * self.itemsize

    @property
    def bytes(self) -> int:
        """Bytes of a token on all ranks, which all move at once."""
        return self.rank_bytes * self.tp_size


def pages_up(tokens: int, page: int) -> int:
    """Tokens in whole pages."""
    return -(-tokens // page) * page


def host_pool_tokens(size_gb: float, shape: KVShape, page: int) -> int:
    """Tokens that a pool of --hicache-size holds. One page more is allocated, and never given out."""
    return int(size_gb * 1e9 // shape.rank_bytes) // page * page


def hicache_gb(tokens: int, shape: KVShape) -> int:
    """The smallest --hicache-size (whole GB a rank) whose pool holds so many tokens."""
    return max(1, math.ceil(tokens * shape.rank_bytes / 1e9))


def available_host_bytes() -> int:
    """Host memory that pools of this machine's ranks may take together, as SGLang reckons it (cgroups included)."""
    with suppress(Exception):  # no SGLang, or one that reckons elsewhere
        return launcher_host_budget(1)(0)
    return fallback_host_budget(1)(0)


def check_fits(
    *,
    prompt_tokens: int,
    output_tokens: int,
    device_tokens: int | None,
    host_tokens_needed: int,
    hicache_size_gb: float,
    shape: KVShape,
    page: int,
    max_context: int | None,
    in_host_memory: bool,
    gpu_bytes: int | None,
) -> None:
    """Refuse a workload that cannot run as asked.

    Args:
        prompt_tokens: longest prompt.
        output_tokens: longest answer.
        device_tokens: size of the GPU's KV pool, None where SGLang decides.
        host_tokens_needed: what has to stay in HiCache's pool for the hits to come from there; 0 without HiCache.
        hicache_size_gb: --hicache-size.
        shape: of a token's KV cache.
        page: tokens.
        max_context: the model's limit.
        in_host_memory: whether the pool is in host memory.
        gpu_bytes: memory of a GPU, None without one.

    Raises:
        ConfigError: one sentence.
    """
    longest = prompt_tokens + output_tokens
    if max_context is not None and longest > max_context:
        raise ConfigError(
            f"a prompt of {prompt_tokens} tokens with {output_tokens} of output is longer than the model's context of "
            f"{max_context} tokens; ask for shorter ones."
        )
    if device_tokens is not None and pages_up(longest, page) > device_tokens:
        raise ConfigError(
            f"a prompt of {prompt_tokens} tokens with {output_tokens} of output does not fit into a KV pool of "
            f"{device_tokens} tokens; raise --device-tokens or ask for shorter ones."
        )
    if device_tokens is not None and gpu_bytes is not None and device_tokens * shape.rank_bytes > gpu_bytes:
        raise ConfigError(
            f"the KV pool of {device_tokens} tokens takes {device_tokens * shape.rank_bytes / 1e9:.1f} GB, and the GPU "
            f"has {gpu_bytes / 1e9:.1f} GB; ask for shorter prompts, less concurrency or more --tp-size."
        )
    if not host_tokens_needed:
        return
    held = host_pool_tokens(hicache_size_gb, shape, page)
    if host_tokens_needed > held:
        raise ConfigError(
            f"the workload needs {host_tokens_needed} tokens in HiCache's pool and --hicache-size {hicache_size_gb:g} "
            f"holds {held}; use --hicache-size {hicache_gb(host_tokens_needed + page, shape)} or more, or leave it out."
        )
    pool_bytes = int(hicache_size_gb * 1e9) * shape.tp_size
    if in_host_memory and pool_bytes > available_host_bytes():
        raise ConfigError(
            f"HiCache's pool of {pool_bytes / 1e9:.1f} GB does not fit into the {available_host_bytes() / 1e9:.1f} GB "
            "of host memory that SGLang may take; ask for shorter prompts or fewer of them."
        )
