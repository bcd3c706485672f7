#!/usr/bin/env python3
"""Write a small random model in Hugging Face format, without a tokenizer: make_tiny_model.py DIR [options].

`--kind` selects the pools that SGLang keeps for it:
  mha         Qwen3: K and V
  mla         DeepSeek V2: latents
  dsa         DeepSeek V3.2: latents, and keys of an indexer
  swa         Mellum: K and V of full layers, and of sliding-window layers
  asymmetric  MiMo-V2: as swa, V narrower than K
  gdn         Qwen3-Next: K and V of full layers, and states of linear ones
  mtp         MiMo: K and V, also of a layer that drafts

A plain random model attends to all tokens equally, so its greedy output hardly depends on the prompt's prefix and a
damaged load goes unnoticed. Here attention is sharpened and outweighs the rest of each layer, in each kind so much that
the output depends on each of its pools.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

VOCABULARY = 1024


def common(arguments: argparse.Namespace) -> dict[str, Any]:
    """Settings of all kinds' configurations."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": arguments.hidden_size,
        "intermediate_size": 2 * arguments.hidden_size,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.heads,
        "num_key_value_heads": arguments.kv_heads,
        "head_dim": arguments.head_dim,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.15 * (256 / arguments.hidden_size) ** 0.5,
    }


def make_mha(arguments: argparse.Namespace) -> Any:
    """Qwen3: one pool of K and V."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(Qwen3Config(**common(arguments)))
    for layer in model.model.layers:
        layer.self_attn.q_norm.weight.fill_(arguments.sharpness)
        layer.self_attn.k_norm.weight.fill_(arguments.sharpness / 2)
        layer.self_attn.o_proj.weight.mul_(6.0)
        layer.mlp.down_proj.weight.mul_(0.3)
    return model


def latent_sizes(arguments: argparse.Namespace) -> dict[str, Any]:
    """Settings of the configurations of DeepSeek's models."""
    dim = arguments.head_dim // 2
    return {
        **common(arguments),
        "num_key_value_heads": arguments.heads,
        "head_dim": dim,
        "moe_intermediate_size": 128,
        "kv_lora_rank": 2 * dim,
        "qk_rope_head_dim": dim,
        "qk_nope_head_dim": dim,
        "v_head_dim": dim,
        # Dense in all layers; SGLang still requires a description of the experts.
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": arguments.layers + 1,  # SGLang also reads the entry after the last layer
        "n_group": 1,
        "topk_group": 1,
        # Scales nothing (factor 1), but SGLang supports DeepSeek's attention on a CPU only with its own rotary
        # embedding.
        "rope_scaling": {
            "type": "yarn",
            "rope_type": "yarn",
            "factor": 1.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 32768,
            "rope_theta": 10000.0,
        },
    }


def make_mla(arguments: argparse.Namespace) -> Any:
    """DeepSeek V2: one pool of latents, which are both K and V."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    config = DeepseekV2Config(**latent_sizes(arguments), q_lora_rank=None, topk_method="greedy")
    model = DeepseekV2ForCausalLM(config)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.mul_(0.75 * arguments.sharpness)
        layer.self_attn.o_proj.weight.mul_(6.0)
        layer.mlp.down_proj.weight.mul_(0.3)
    return model


def make_dsa(arguments: argparse.Namespace) -> Any:
    """DeepSeek V3.2: a pool of latents, and one of keys that pick 32 tokens to attend to."""
    from torch import nn
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    class DeepseekV32ForCausalLM(DeepseekV3ForCausalLM):
        """Named as SGLang's class, so that the configuration contains that name."""

    ranks = {"q_lora_rank": 128, "index_topk": 32, "index_n_heads": 2, "index_head_dim": 128}
    config = DeepseekV3Config(**latent_sizes(arguments), **ranks)
    model = DeepseekV32ForCausalLM(config)
    for layer in model.model.layers:
        indexer = nn.Module()
        indexer.wq_b = nn.Linear(128, 2 * 128, bias=False)
        indexer.wk = nn.Linear(config.hidden_size, 128, bias=False)
        indexer.weights_proj = nn.Linear(config.hidden_size, 2, bias=False)
        indexer.k_norm = nn.LayerNorm(128)
        layer.self_attn.indexer = indexer
        layer.self_attn.q_b_proj.weight.mul_(0.75 * arguments.sharpness)
        layer.self_attn.o_proj.weight.mul_(6.0)
        layer.mlp.down_proj.weight.mul_(0.3)
    return model


def layer_types(arguments: argparse.Namespace, other: str) -> list[str]:
    """Each fourth layer has full attention."""
    return ["full_attention" if index % 4 == 3 else other for index in range(arguments.layers)]


def make_swa(arguments: argparse.Namespace) -> Any:
    """Mellum: a pool of K and V for full layers, and one for layers that see the last 64 tokens."""
    from transformers import MellumConfig, MellumForCausalLM

    config = MellumConfig(
        **common(arguments),
        moe_intermediate_size=128,
        sliding_window=64,
        layer_types=layer_types(arguments, "sliding_attention"),
        mlp_layer_types=["dense"] * arguments.layers,
        num_experts=4,
        num_experts_per_tok=2,
    )
    model = MellumForCausalLM(config)
    for layer, kind in zip(model.model.layers, config.layer_types, strict=True):
        layer.self_attn.q_norm.weight.fill_(arguments.sharpness)
        layer.self_attn.k_norm.weight.fill_(arguments.sharpness / 2)
        # Tokens outside the window reach the output only through full layers.
        layer.self_attn.o_proj.weight.mul_(40.0 if kind == "full_attention" else 6.0)
        layer.mlp.down_proj.weight.mul_(0.3)
    return model


def make_asymmetric(arguments: argparse.Namespace) -> Any:
    """MiMo-V2: as Mellum, but V has half as many elements as K."""
    from transformers import MiMoV2FlashConfig, MiMoV2FlashForCausalLM, Qwen3Config

    types = layer_types(arguments, "sliding_attention")
    heads = {
        "num_attention_heads": arguments.heads,
        "num_key_value_heads": arguments.kv_heads,
        "head_dim": arguments.head_dim,
        "v_head_dim": arguments.head_dim // 2,
    }
    sizes = {**common(arguments), **heads, "layer_types": types, "moe_intermediate_size": 128}
    sizes |= {"n_routed_experts": 4, "num_experts_per_tok": 2}
    config = MiMoV2FlashConfig(**sizes, sliding_window=64, mlp_layer_types=["dense"] * arguments.layers)
    model = MiMoV2FlashForCausalLM(config)
    for layer, kind in zip(model.model.layers, types, strict=True):
        if hasattr(layer.self_attn, "sinks"):
            del layer.self_attn.sinks
        layer.self_attn.q_proj.weight.mul_(0.75 * arguments.sharpness)
        # Tokens outside the window reach the output only through full layers.
        layer.self_attn.o_proj.weight.mul_(40.0 if kind == "full_attention" else 6.0)
        layer.mlp.down_proj.weight.mul_(0.3)
    # SGLang reads the published model's names, and cannot read the rotary embeddings that Transformers writes for each
    # type of layer; so the configuration is another model's, with those names in it.
    model.config = Qwen3Config(
        **sizes,
        **{f"swa_{name}": count for name, count in heads.items()},
        hybrid_layer_pattern=[int(kind == "sliding_attention") for kind in types],
        moe_layer_freq=[0] * arguments.layers,
        sliding_window_size=64,
        layernorm_epsilon=1e-5,
        attention_value_scale=0.707,
        encoder_only=False,
        scale_emb=1.0,
        topk_method="greedy",
        scoring_func="softmax",
        add_swa_attention_sink_bias=False,
        add_full_attention_sink_bias=False,
    )
    return model


def make_mtp(arguments: argparse.Namespace) -> Any:
    """MiMo: Qwen2 with a draft layer. Its drafts are random, so none is accepted."""
    from torch import nn
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm

    class MiMoForCausalLM(Qwen2ForCausalLM):
        """Named as SGLang's class, so that the configuration contains that name."""

    config = Qwen2Config(**common(arguments), num_nextn_predict_layers=1)
    model = MiMoForCausalLM(config)
    layer = Qwen2DecoderLayer(config, arguments.layers - 1)
    for name in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
        layer.add_module(name, Qwen2RMSNorm(config.hidden_size))
    layer.add_module("input_proj", nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False))
    model.model.add_module("mtp_layers", nn.ModuleList([layer]))
    for layer in (*model.model.layers, *model.model.mtp_layers):
        layer.self_attn.q_proj.weight.mul_(0.75 * arguments.sharpness)
        layer.self_attn.o_proj.weight.mul_(6.0)
        layer.mlp.down_proj.weight.mul_(0.3)
    return model


def make_gdn(arguments: argparse.Namespace) -> Any:
    """Qwen3-Next: a pool of K and V for full layers, and one of states (temporal and convolution) for linear ones."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        **common(arguments),
        moe_intermediate_size=128,
        shared_expert_intermediate_size=128,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        linear_conv_kernel_dim=4,
        # In SGLang all layers have experts.
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        layer_types=layer_types(arguments, "linear_attention"),
        full_attention_interval=4,
    )
    model = Qwen3NextForCausalLM(config)
    for layer in model.model.layers:
        if hasattr(layer, "self_attn"):
            layer.self_attn.q_norm.weight.fill_(0.75 * arguments.sharpness)
            layer.self_attn.k_norm.weight.fill_(0.25 * arguments.sharpness)
            layer.self_attn.o_proj.weight.mul_(8.0)
        else:
            layer.linear_attn.out_proj.weight.mul_(6.0)
            # A slow decay: a state remembers its prefix.
            layer.linear_attn.A_log.fill_(-3.0)
        layer.mlp.shared_expert.down_proj.weight.mul_(0.3)
        layer.mlp.experts.down_proj.mul_(0.3)
    return model


KINDS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "mha": make_mha,
    "mla": make_mla,
    "dsa": make_dsa,
    "swa": make_swa,
    "asymmetric": make_asymmetric,
    "mtp": make_mtp,
    "gdn": make_gdn,
}


def make_model(arguments: argparse.Namespace) -> Any:
    """Make the model in bfloat16; equal arguments give equal weights."""
    import torch

    torch.manual_seed(arguments.seed)
    with torch.no_grad():
        return KINDS[arguments.kind](arguments).to(torch.bfloat16)


def has_gpu() -> bool:
    """Whether nvidia-smi lists a GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    listing = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    return listing.stdout.startswith("GPU ")


def main() -> None:
    """Parse the command line and write the model."""
    parser = argparse.ArgumentParser(description="Write a small random model whose output depends on its prefix.")
    parser.add_argument("directory")
    parser.add_argument("--kind", choices=KINDS, default="mha", help="pools that SGLang keeps for it (default: mha)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument(
        "--sharpness",
        type=float,
        default=4.0,
        help="sharpness of attention; at 4 rounding alone changes the outputs of a deep model, at 2 it does not",
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if os.environ.get("SGLANG_USE_CPU_ENGINE") != "1" and not has_gpu():
        # Otherwise Transformers fails deep inside with an SGLang environment's CUDA build of torchvision.
        sys.exit("make_tiny_model.py: this machine has no GPU; set SGLANG_USE_CPU_ENGINE=1 and try again")
    make_model(arguments).save_pretrained(arguments.directory)


if __name__ == "__main__":
    main()
