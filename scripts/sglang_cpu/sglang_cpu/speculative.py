"""Torch versions of the functions of `sgl_kernel` that SGLang's speculative decoding calls on a CPU.

Names and parameters are those of SGLang's call sites; where it has a Triton kernel of the same name, these do the same.
Trees of drafts are supported only for topk 1: a chain.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch

__all__ = [
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "verify_tree_greedy_cpu",
]


def copy_all_layer_kv_cache_cpu(
    data_ptrs: torch.Tensor, strides: torch.Tensor, tgt_loc: torch.Tensor, src_loc: torch.Tensor
) -> None:
    """Copy rows src_loc to rows tgt_loc in each buffer; data_ptrs are addresses, strides the bytes of a row."""
    if len(tgt_loc) == 0:
        return
    target, source = tgt_loc.long().numpy(), src_loc.long().numpy()
    rows = int(max(target.max(), source.max())) + 1
    for address, stride in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        memory = (ctypes.c_uint8 * (rows * stride)).from_address(address)
        buffer = np.frombuffer(memoryview(memory), dtype=np.uint8).reshape(rows, stride)
        # The right side is a copy, so rows may be both source and target.
        buffer[target] = buffer[source]


def assign_draft_cache_locs_contiguous_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    seq_lens: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
    topk: int,
    speculative_num_steps: int,
) -> None:
    """Return each request's next topk * speculative_num_steps slots."""
    count = topk * speculative_num_steps
    for index, (request, start) in enumerate(zip(req_pool_indices.tolist(), seq_lens.tolist(), strict=True)):
        out_cache_loc[index * count : (index + 1) * count] = req_to_token[request, start : start + count]


def assign_extend_cache_locs_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Return each request's slots from start_offset to end_offset, concatenated."""
    done = 0
    rows = zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True)
    for request, start, end in rows:
        out_cache_loc[done : done + end - start] = req_to_token[request, start:end]
        done += end - start


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Store each request's slots from start_offset to end_offset, concatenated."""
    done = 0
    rows = zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True)
    for request, start, end in rows:
        req_to_token[request, start:end] = out_cache_loc[done : done + end - start].to(req_to_token.dtype)
        done += end - start


def build_tree_kernel_efficient_cpu(
    parent_list: torch.Tensor,
    selected_index: torch.Tensor,
    verified_seq_len: torch.Tensor,
    tree_mask: torch.Tensor,
    positions: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    topk: int,
    depth: int,
    draft_token_num: int,
    tree_mask_mode: int,
) -> None:
    """Describe each request's drafts as a chain: each token's successor, position and attention mask."""
    if topk != 1:
        raise NotImplementedError(f"sglang_cpu supports trees of drafts only for topk 1, not {topk}")
    if int(tree_mask_mode) not in (0, 1):
        raise NotImplementedError(f"sglang_cpu does not support packed masks of drafts (mode {tree_mask_mode})")
    batch = len(verified_seq_len)
    index, following = retrive_index.view(batch, -1), retrive_next_token.view(batch, -1)
    place, mask = positions.view(batch, -1), tree_mask.view(-1)
    offset = 0
    for request, length in enumerate(verified_seq_len.tolist()):
        index[request] = torch.arange(draft_token_num) + request * draft_token_num
        following[request, :-1] = torch.arange(1, draft_token_num)
        place[request] = torch.arange(draft_token_num) + length
        # Mode 0: a row starts with the context before the drafts, set by its maker and visible to all.
        context = length if int(tree_mask_mode) == 0 else 0
        rows = mask[offset : offset + draft_token_num * (context + draft_token_num)].view(draft_token_num, -1)
        rows[:, context:] = torch.ones(draft_token_num, draft_token_num, dtype=torch.bool).tril().to(rows.dtype)
        offset += rows.numel()


def verify_tree_greedy_cpu(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    target_predict: torch.Tensor,
    **kwargs: Any,
) -> None:
    """Follow each tree of drafts while a draft equals the target's token."""
    says, flat_predicts = target_predict.view(-1), predicts.view(-1)
    for request in range(len(candidates)):
        last = int(retrive_index[request, 0])
        accept_index[request, 0] = last
        accepted, node = 0, 0
        for _ in range(1, accept_index.shape[1]):
            node = int(retrive_next_token[request, node])
            while node != -1 and candidates[request, node] != says[last]:
                node = int(retrive_next_sibling[request, node])
            if node == -1:
                break
            flat_predicts[last] = says[last]
            accepted += 1
            last = int(retrive_index[request, node])
            accept_index[request, accepted] = last
        accept_token_num[request] = accepted
        flat_predicts[last] = says[last]


def fill_bonus_tokens_cpu(
    accept_tokens: torch.Tensor, accept_lens: torch.Tensor, bonus_tokens: torch.Tensor, accept_stride: int
) -> None:
    """Take the last accepted token of each request."""
    last = torch.arange(len(accept_lens)) * accept_stride + accept_lens.long() - 1
    bonus_tokens[: len(accept_lens)] = accept_tokens.view(-1)[last].to(bonus_tokens.dtype)


def fill_accept_out_cache_loc_cpu(
    accept_index: torch.Tensor, out_cache_loc: torch.Tensor, accept_out_cache_loc: torch.Tensor
) -> None:
    """Concatenate the slots of accepted drafts."""
    accepted = accept_index.view(-1)
    accepted = accepted[accepted > -1].long()
    accept_out_cache_loc[: len(accepted)] = out_cache_loc[accepted]
