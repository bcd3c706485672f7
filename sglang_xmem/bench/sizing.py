"""How much KV cache a workload needs and a pool holds, by SGLang's own arithmetic; what cannot fit is refused.

Sources, SGLang 0.5.23: bytes of a token, mem_cache/pool_host/mha.py and mla.py; pool size, mem_cache/pool_host/base.py
(HostKVCache.__init__, --hicache-size in units of 1e9 bytes, one padding page).
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from sglang_xmem.doctor.tiers import fallback_host_budget
from sglang_xmem.engines.sglang.host_budget import launcher_host_budget
from sglang_xmem.errors import ConfigError

#: Tokens per state of linear attention that pools have a slot for. SGLang keeps a state where a prompt ends and one for
#: each chunk of 8K tokens that it prefilled, so some slots stay free.
TOKENS_OF_A_STATE = 2048


@dataclass(frozen=True)
class KVShape:
    """What decides a token's bytes of KV cache.

    Attributes:
        layers: of the model, which a load and a forward pass go through one by one.
        rank_bytes: of a token on one rank, in the layers whose KV all tokens have.
        tp_size: ranks that move their parts at once.
        hybrid: the model has more state than this, in pools of their own.
        state_bytes: of a prefix's state of linear attention on one rank; 0 without such layers.
        replicated: all ranks hold the same bytes, as with MLA's latents.
    """

    layers: int
    rank_bytes: int
    tp_size: int
    hybrid: bool
    state_bytes: int = 0
    replicated: bool = False

    @staticmethod
    def of(config: dict[str, Any], tp_size: int = 1, kv_cache_dtype: str = "auto") -> KVShape:
        """Of a model's config.json; `kv_cache_dtype` as SGLang's option of that name."""
        dtype = str(config.get("torch_dtype") or config.get("dtype") or "bfloat16")
        itemsize = (
            1 if kv_cache_dtype.startswith("fp8") else 4 if kv_cache_dtype == "auto" and "float32" in dtype else 2
        )
        layers = config["num_hidden_layers"]
        if config.get("kv_lora_rank"):  # latents, which all ranks have
            width = config["kv_lora_rank"] + config["qk_rope_head_dim"]
            return KVShape(layers, layers * width * itemsize, tp_size, hybrid=False, replicated=tp_size > 1)
        heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        full = layers // config["full_attention_interval"] if config.get("full_attention_interval") else layers
        if config.get("layer_types"):
            full = config["layer_types"].count("full_attention")
        # Heads are replicated where there are fewer than ranks.
        rank_bytes = 2 * full * max(1, heads // tp_size) * dim * itemsize
        state_bytes = (layers - full) * _state_bytes(config, itemsize) // tp_size
        return KVShape(layers, rank_bytes, tp_size, full < layers, state_bytes)

    def hit_bytes(self, tokens: int) -> int:
        """Bytes that a hit of so many tokens moves on all ranks, which all move at once; windows are not counted."""
        return (tokens * self.rank_bytes + self.state_bytes) * self.tp_size

    @property
    def pool_bytes(self) -> float:
        """Bytes of a token on one rank in all of HiCache's pools, above what it takes where there are several.

        SGLang divides --hicache-size among pools as the GPU's are divided, and not as a workload needs it.
        """
        if self.state_bytes:
            return 1.5 * (self.rank_bytes + self.state_bytes / TOKENS_OF_A_STATE)
        return self.rank_bytes * (4.0 if self.hybrid else 1.0)


def _state_bytes(config: dict[str, Any], itemsize: int) -> int:
    """Bytes of a gated delta net's state in one layer: a float32 matrix per head, and inputs of the convolution."""
    if not config.get("linear_num_value_heads"):
        return 0
    heads, key_heads = config["linear_num_value_heads"], config["linear_num_key_heads"]
    key, value = config["linear_key_head_dim"], config["linear_value_head_dim"]
    channels = 2 * key_heads * key + heads * value
    return int(heads * key * value * 4 + channels * (config["linear_conv_kernel_dim"] - 1) * itemsize)


def pages_up(tokens: int, page: int) -> int:
    """Tokens in whole pages."""
    return -(-tokens // page) * page


def least_hit(tokens: int, page: int) -> int:
    """Tokens that a hit of so many has at least: up to two pages less, but one page.

    A prompt's last token is always computed again, with what else is in its page, and a page more may be.
    """
    return max(tokens - 2 * page, min(tokens, page))


def host_pool_tokens(size_gb: float, shape: KVShape, page: int) -> int:
    """Tokens that a pool of --hicache-size holds. One page more is allocated, and never given out."""
    return int(size_gb * 1e9 // shape.rank_bytes) // page * page


def hicache_gb(tokens: int, shape: KVShape) -> int:
    """The smallest --hicache-size (whole GB per rank) whose pool holds so many tokens."""
    return max(1, math.ceil(tokens * shape.pool_bytes / 1e9))


def available_host_bytes() -> int:
    """Host memory that pools of this machine's ranks may have together, as SGLang counts it (cgroups included)."""
    with suppress(Exception):  # no SGLang, or one that has its rule elsewhere
        return launcher_host_budget(1)(0)
    return fallback_host_budget(1)(0)


class Need(NamedTuple):
    """What a case needs of its engine, in tokens.

    Attributes:
        prompt, output: of the largest request.
        device: size of the GPU's KV pool; None leaves it to SGLang.
        pool: what has to stay in HiCache's pool for the hits to come from there.
        running: requests at once.
    """

    prompt: int
    output: int
    device: int | None
    pool: int
    running: int

    def check(self, shape: KVShape, page: int, max_context: int | None, pool_gb: float | None) -> None:
        """Refuse what cannot run as asked.

        Args:
            max_context: the model's limit.
            pool_gb: --hicache-size, None for an engine without HiCache.

        Raises:
            ConfigError: "Problem. Fix."
        """
        longest = self.prompt + self.output
        what = f"A prompt of {self.prompt} tokens with {self.output} of output"
        if max_context is not None and longest > max_context:
            raise ConfigError(f"{what} is longer than the model's context of {max_context} tokens. Ask for less.")
        if self.device is not None and pages_up(longest, page) > self.device:
            raise ConfigError(f"{what} does not fit into a KV pool of {self.device} tokens. Raise --device-tokens.")
        held = math.inf if pool_gb is None or shape.hybrid else host_pool_tokens(pool_gb, shape, page)
        if self.pool > held:
            fits = hicache_gb(self.pool + page, shape)
            raise ConfigError(
                f"{self.pool} tokens have to stay in HiCache's pool, and --hicache-size {pool_gb:g} holds {held}. Use "
                f"--hicache-size {fits} or more, or leave it out."
            )
