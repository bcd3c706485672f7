"""Torch versions of the functions of `sgl_kernel` that gated delta networks (Qwen3-Next) call on a CPU.

They compute token by token in float32: correct but slow, so prompts should be short.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["causal_conv1d_fn_cpu", "causal_conv1d_update_cpu", "chunk_gated_delta_rule_cpu"]


def _activated(y: torch.Tensor, activation: str | bool | None) -> torch.Tensor:
    return F.silu(y) if activation in ("silu", "swish", True) else y


def causal_conv1d_fn_cpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | bool | None = None,
    conv_states: Any = None,
    has_initial_state: Any = None,
    cache_indices: Any = None,
    query_start_loc: Any = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Convolve several sequences, x is (channels, tokens); their last tokens are kept in conv_states."""
    out = torch.empty_like(x)
    width = weight.shape[-1]
    kernel = weight.reshape(weight.shape[0], 1, width).float()
    for sequence in range(len(query_start_loc) - 1):
        start, end = int(query_start_loc[sequence]), int(query_start_loc[sequence + 1])
        state = conv_states[int(cache_indices[sequence])]
        before = state.float()[:, -(width - 1) :]
        if not bool(has_initial_state[sequence]):
            before = torch.zeros_like(before)
        whole = torch.cat([before, x[:, start:end].float()], 1)
        y = F.conv1d(whole[None], kernel, None if bias is None else bias.float(), groups=len(kernel))[0]
        out[:, start:end] = _activated(y, activation).to(x.dtype)
        state.copy_(whole[:, -(width - 1) :])
    return out


def causal_conv1d_update_cpu(
    x: torch.Tensor,
    conv_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | bool | None = None,
    conv_state_indices: Any = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Convolve one more token of each sequence; x is (sequences, channels)."""
    out = torch.empty_like(x)
    width = weight.shape[-1]
    kernel = weight.reshape(weight.shape[0], width).float()
    for sequence in range(x.shape[0]):
        state = conv_states[int(conv_state_indices[sequence])]
        whole = torch.cat([state.float()[:, -(width - 1) :], x[sequence].float()[:, None]], 1)
        y = (whole * kernel).sum(1)
        if bias is not None:
            y = y + bias.float()
        out[sequence] = _activated(y, activation).to(x.dtype)
        state.copy_(whole[:, -(width - 1) :])
    return out


def fused_gdn_gating_cpu(
    A_log: torch.Tensor, a: torch.Tensor, b: torch.Tensor, dt_bias: torch.Tensor, *args: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the decay (as a logarithm) and the rate at which a token is written."""
    decay = -torch.exp(A_log.float()) * F.softplus(a.float() + dt_bias.float())
    return decay.unsqueeze(0), torch.sigmoid(b.float()).unsqueeze(0)


def _delta_rule(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, rate: torch.Tensor, state: torch.Tensor
) -> torch.Tensor:
    """One sequence: q and k are (tokens, heads, K), v is (tokens, value heads, V), the state (value heads, V, K)."""
    tokens, value_heads = v.shape[:2]
    repeat = value_heads // q.shape[1]
    q = F.normalize(q.float(), dim=-1).repeat_interleave(repeat, 1) * q.shape[-1] ** -0.5
    k = F.normalize(k.float(), dim=-1).repeat_interleave(repeat, 1)
    memory = state.float().clone()
    out = torch.empty(tokens, value_heads, v.shape[-1])
    for token in range(tokens):
        memory = memory * decay[token].exp()[:, None, None]
        change = (v[token].float() - torch.einsum("hvk,hk->hv", memory, k[token])) * rate[token][:, None]
        memory = memory + change[:, :, None] * k[token][:, None, :]
        out[token] = torch.einsum("hvk,hk->hv", memory, q[token])
    state.copy_(memory)
    return out


def chunk_gated_delta_rule_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: Any = None,
    cu_seqlens: Any = None,
    initial_state_indices: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None, None]:
    """Run several sequences from their states, which are advanced in place."""
    out = torch.empty_like(v)
    for sequence in range(len(cu_seqlens) - 1):
        span = slice(int(cu_seqlens[sequence]), int(cu_seqlens[sequence + 1]))
        state = initial_state[int(initial_state_indices[sequence])]
        part = _delta_rule(q[0, span], k[0, span], v[0, span], g[0, span].float(), beta[0, span].float(), state)
        out[0, span] = part.to(v.dtype)
    return out, None, None


def fused_sigmoid_gating_delta_rule_update_cpu(
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    initial_state_source: torch.Tensor,
    initial_state_indices: torch.Tensor,
    cu_seqlens: torch.Tensor,
    **kwargs: Any,
) -> torch.Tensor:
    """Run one more token of each sequence."""
    heads = A_log.numel()
    g, beta = fused_gdn_gating_cpu(A_log, a.reshape(-1, heads), b.reshape(-1, heads), dt_bias)
    q, k, v = (tensor.reshape(1, -1, *tensor.shape[-2:]) for tensor in (q, k, v))
    return chunk_gated_delta_rule_cpu(q, k, v, g, beta, initial_state_source, cu_seqlens, initial_state_indices)[0]


def fused_rmsnorm_gated_cpu(x: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise x and multiply it by silu(gate)."""
    return (F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps) * F.silu(gate.float())).to(x.dtype)


#: Called as torch.ops.sgl_kernel.<name>.
OPERATORS = (fused_gdn_gating_cpu, fused_sigmoid_gating_delta_rule_update_cpu, fused_rmsnorm_gated_cpu)
