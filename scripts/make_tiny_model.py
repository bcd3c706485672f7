#!/usr/bin/env python3
"""Writes a small random Qwen3 in Hugging Face format, without a tokenizer: make_tiny_model.py DIR [options].

A plain random model attends to all tokens alike, so its greedy output hardly depends on the prompt's prefix and a
damaged KV load goes unnoticed. Here the attention is sharpened and made to outweigh the rest of each layer.
"""

from __future__ import annotations

import argparse

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM


def make_model(arguments: argparse.Namespace) -> Qwen3ForCausalLM:
    """The model in bfloat16; equal arguments give equal weights."""
    torch.manual_seed(arguments.seed)
    config = Qwen3Config(
        vocab_size=1024,
        hidden_size=arguments.hidden_size,
        intermediate_size=2 * arguments.hidden_size,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        head_dim=arguments.head_dim,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.15 * (256 / arguments.hidden_size) ** 0.5,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_norm.weight.fill_(arguments.sharpness)
            layer.self_attn.k_norm.weight.fill_(arguments.sharpness / 2)
            layer.self_attn.o_proj.weight.mul_(6.0)
            layer.mlp.down_proj.weight.mul_(0.3)
    return model.to(torch.bfloat16)


def main() -> None:
    """Parse the command line and write the model."""
    parser = argparse.ArgumentParser(description="Write a small random Qwen3 whose output depends on its prefix.")
    parser.add_argument("directory")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument(
        "--sharpness",
        type=float,
        default=4.0,
        help="of attention; at 4 rounding alone changes the outputs of a deep model, at 2 it does not",
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make_model(arguments).save_pretrained(arguments.directory)


if __name__ == "__main__":
    main()
