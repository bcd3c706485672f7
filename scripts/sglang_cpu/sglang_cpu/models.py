"""CPU versions of functions that SGLang's models and its torch attention have only for accelerators.

This module is independent of HiCache; each function serves the models that call it.
"""

from __future__ import annotations

import copy
import unittest.mock
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

#: Targets of HookRegistry and their hooks.
AROUND: dict[str, Callable[..., Any]] = {}


def _around(*targets: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(hook: Callable[..., Any]) -> Callable[..., Any]:
        AROUND.update(dict.fromkeys(targets, hook))
        return hook

    return register


_TORCH_ATTENTION = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"


@_around(f"{_TORCH_ATTENTION}._run_sdpa_forward_extend", f"{_TORCH_ATTENTION}._run_sdpa_forward_decode")
def read_window_pool(
    original: Callable[..., Any],
    self: Any,
    query: Any,
    output: Any,
    k_cache: Any,
    v_cache: Any,
    req_to_token: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Translate the read location of a sliding-window layer's K and V; the torch attention translates only writes."""
    window = kwargs.get("sliding_window_size")
    if self.use_sliding_window_kv_pool and window is not None and window > -1:
        slots = self.token_to_kv_pool.translate_loc_from_full_to_swa(req_to_token.reshape(-1).long())
        req_to_token = slots.reshape(req_to_token.shape)
    return original(self, query, output, k_cache, v_cache, req_to_token, *args, **kwargs)


@_around("sglang.kernels.ops.attention.fla.fused_norm_gate.FusedRMSNormGated.forward")
def gated_rms_norm(
    original: Callable[..., Any], self: Any, x: torch.Tensor, g: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """Normalise x and gate it: Qwen3-Next's norm after its linear attention."""
    normed = F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps)
    return (normed * F.silu(g.float())).to(x.dtype)


@_around("sglang.kernels.ops.elementwise.elementwise.fused_sigmoid_mul")
def sigmoid_mul(
    original: Callable[..., Any], attn_output: torch.Tensor, gate: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """Gate the output of Qwen3-Next's full attention."""
    gated = attn_output.float() * torch.sigmoid(gate.reshape(attn_output.shape).float())
    return gated.to(attn_output.dtype)


@_around("sglang.kernels.ops.elementwise.elementwise._launch_fused_gate_sigmoid_mul")
def gate_shared_expert(
    original: Callable[..., Any],
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    shared_output: torch.Tensor,
    output: torch.Tensor,
    *,
    do_add: bool,
    **kwargs: Any,
) -> None:
    """Gate the output of Qwen3-Next's shared expert, and add it to the other experts'."""
    gate = torch.sigmoid(hidden_states.float() @ gate_weight.float())[:, None]
    gated = gate * shared_output.float()
    output.copy_(output.float() + gated if do_add else gated)


@_around(f"{_TORCH_ATTENTION}.forward_extend", f"{_TORCH_ATTENTION}.forward_decode")
def torch_attention(
    original: Callable[..., Any], self: Any, q: Any, k: Any, v: Any, layer: Any, batch: Any, *args: Any, **kwargs: Any
) -> Any:
    """Accept arguments for other backends: absent sinks, drafts to verify, and selected tokens.

    Each request is extended by a chain of drafts, which is not in its batch; the rest is causal attention.
    """
    picked = kwargs.pop("topk_indices", None)
    if kwargs.pop("sinks", None) is not None:
        raise NotImplementedError("SGLang's torch attention does not support sinks")
    if batch.forward_mode.is_target_verify():
        prefixes = batch.seq_lens
        drafts = torch.full_like(prefixes, batch.spec_info.draft_token_num)
        batch = copy.copy(batch)
        batch.extend_prefix_lens, batch.extend_seq_lens, batch.seq_lens = prefixes, drafts, prefixes + drafts
    # With selected tokens, only for its writes.
    output = original(self, q, k, v, layer, batch, *args, **kwargs)
    return output if picked is None else _attend_to(picked, self, q, layer)


def _attend_to(picked: torch.Tensor, backend: Any, q: torch.Tensor, layer: Any) -> torch.Tensor:
    """Attention of each token to the latents of its selected slots; -1 is none."""
    queries = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim).float()
    latents = backend.token_to_kv_pool.get_key_buffer(layer.layer_id)[picked.clamp(min=0)].squeeze(2).float()
    scores = torch.einsum("thd,tkd->thk", queries, latents) * layer.scaling
    weights = scores.masked_fill((picked < 0)[:, None], float("-inf")).softmax(-1)
    output = torch.einsum("thk,tkd->thd", weights, latents[..., : layer.v_head_dim])
    return output.reshape(len(queries), -1).to(q.dtype)


@_around("sglang.srt.layers.attention.dsa.dsa_indexer.Indexer.forward_native")
def pick_tokens(
    original: Callable[..., Any],
    self: Any,
    x: torch.Tensor,
    q_lora: torch.Tensor,
    positions: torch.Tensor,
    forward_batch: Any,
    layer_id: int,
    return_indices: bool = True,
) -> torch.Tensor | None:
    """Store new keys as in DeepSeek V3.2's indexer (fp8 with a scale, one row per page), and select tokens.

    Without rotary embedding and Hadamard transform: the selection depends on all keys, but differs from a GPU's.
    """
    from sglang.srt.model_executor.forward_context import get_attn_backend, get_token_to_kv_pool

    pool, fp8 = get_token_to_kv_pool(), torch.float8_e4m3fn
    page, dim = getattr(pool, "index_page_size", pool.page_size), self.head_dim
    rows = pool.get_index_k_with_scale_buffer(layer_id=layer_id)
    keys, scales = rows[:, : page * dim].unflatten(1, (page, dim)), rows[:, page * dim :].unflatten(1, (page, 4))
    key = self.k_norm(self.wk(x)[0].float()).float()
    scale = key.abs().amax(-1, keepdim=True).clamp(min=1e-4) / torch.finfo(fp8).max
    slots = forward_batch.out_cache_loc
    keys[slots // page, slots % page] = (key / scale).to(fp8).view(torch.uint8)
    scales[slots // page, slots % page] = scale.view(torch.uint8)
    if not return_indices:
        return None
    query = self.wq_b(q_lora)[0].float().unflatten(-1, (self.n_heads, dim))
    gate = self.weights_proj(x)[0].float()
    picked = torch.full((len(x), self.index_topk), -1, dtype=torch.int64)
    table = get_attn_backend().req_to_token_pool.req_to_token
    lengths = forward_batch.seq_lens.tolist()
    decodes = forward_batch.forward_mode.is_decode()
    extends = [1] * len(lengths) if decodes else forward_batch.extend_seq_lens.tolist()
    begin = 0
    for request, length, extend in zip(forward_batch.req_pool_indices.tolist(), lengths, extends, strict=True):
        seen, span = table[request, :length].long(), slice(begin, begin + extend)
        held = keys[seen // page, seen % page].view(fp8).float()
        held = held * scales[seen // page, seen % page].contiguous().view(torch.float32)
        score = torch.einsum("th,ths->ts", gate[span], torch.relu(torch.einsum("thd,sd->ths", query[span], held)))
        later = torch.arange(length)[None] > positions[span, None]
        best = score.masked_fill(later, float("-inf")).topk(min(self.index_topk, length))
        picked[span, : best.indices.shape[1]] = torch.where(best.values.isinf(), -1, seen[best.indices])
        begin += extend
    return picked


@_around("sglang.srt.speculative.draft_utils.DraftBackendFactory._create_backend")
def draft_attention(original: Callable[..., Any], self: Any, backend_name: str, *args: Any, **kwargs: Any) -> Any:
    """Make the torch attention for drafts, which SGLang supports only for other backends."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    runner = self.draft_model_runner
    if not isinstance(runner.attn_backend, TorchNativeAttnBackend):
        return original(self, backend_name, *args, **kwargs)
    if backend_name != "decode_attention_backend":
        return TorchNativeAttnBackend(runner)
    if self.topk != 1:
        raise NotImplementedError(f"sglang_cpu supports drafts only for topk 1, not {self.topk}")

    class DraftStep(TorchNativeAttnBackend):
        """Attention of one draft, which sees earlier ones."""

        seen = 0

        def forward_decode(self, q: Any, k: Any, v: Any, layer: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
            longer = copy.copy(batch)
            longer.seq_lens = batch.seq_lens + self.seen
            return super().forward_decode(q, k, v, layer, longer, *args, **kwargs)

    return _DraftSteps([DraftStep(runner) for _ in range(self.speculative_num_steps - 1)])


class _DraftSteps:
    """The attention of consecutive drafts, for SGLang's draft worker."""

    def __init__(self, attn_backends: list[Any]) -> None:
        self.attn_backends = attn_backends
        for step, backend in enumerate(attn_backends):
            backend.seen = step + 1

    def init_forward_metadata(self, batch: Any) -> None:
        """Prepare a forward pass."""
        for backend in self.attn_backends:
            backend.init_forward_metadata(batch)


@_around("sglang.srt.arg_groups.model_hook.handle_model_specific_adjustments")
def adjust_for_a_model(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Make SGLang choose as on an H100 where it queries the GPU without a check: DeepSeek V3.2."""
    with unittest.mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)):
        return original(*args, **kwargs)


def register_latent_attention() -> None:
    """Make DeepSeek's models attend to latents in the torch attention; otherwise a prefill expands them to K and V."""
    from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod

    AttentionBackendRegistry.register("torch_native", lambda attention, batch: AttnForwardMethod.MLA)


def register_padding() -> None:
    """Make the torch attention work with DP attention, which pads batches with requests of this length."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    if not hasattr(TorchNativeAttnBackend, "get_cpu_graph_seq_len_fill_value"):
        TorchNativeAttnBackend.get_cpu_graph_seq_len_fill_value = lambda self: 1
