#!/usr/bin/env python3
"""Measures every pool kind over a tier with real SGLang engines, and compares what comes back: pools.py --output FILE.

Two modes. `check`: small random models, sharpened until their outputs depend on every pool; a hit in the tier has to
give the output and the log probabilities of a hit in the GPU's own cache, to the last bit. `ttft`: large shapes with
dummy weights; time to first token of a hit in the tier, in stock HiCache's DRAM and in HBM, each proven by SGLang's
`cached_tokens_details`. One engine per (kind, backend), each in its own process with a time limit of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
COMMON: dict[str, Any] = {
    "vocab_size": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 32768,
}
#: Engine options of a kind, beyond those of all.
KINDS: dict[str, dict[str, Any]] = {
    "mha": {"attention_backend": "flashinfer"},
    "mla": {"attention_backend": "flashinfer"},
    "kv+swa": {"attention_backend": "triton", "hicache_ratio": 12.0},
    "kv+mamba": {
        "attention_backend": "triton",
        "page_size": 1,
        "mamba_radix_cache_strategy": "no_buffer",
        "max_mamba_cache_size": 24,
        "hicache_ratio": 8.0,
        "disable_overlap_schedule": True,
    },
    "draft": {
        "attention_backend": "triton",
        "speculative_algorithm": "STANDALONE",
        "speculative_num_steps": 3,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": 4,
    },
}
#: Behind a kind: the same model with K and V in fp8.
FP8 = "+fp8"
TIERS: dict[str, dict[str, Any]] = {
    "stock": {},
    "dram": {"hicache_use_xmem": True, "hicache_xmem_tier": "dram"},
    "peer": {"hicache_use_xmem": True, "hicache_xmem_tier": "peer", "hicache_xmem_config": '{"peer": {"gpus": [1]}}'},
    "mtier": {"hicache_use_xmem": True, "hicache_xmem_tier": "mtier"},
}


def make_model(kind: str, directory: Path) -> None:
    """Write a small random model of a kind whose outputs depend on each of its pools."""
    import torch
    import transformers as t

    torch.manual_seed(0)
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8, "initializer_range": 0.05}
    config: Any
    if kind in ("mha", "draft", "draft-small"):
        layers = 2 if kind == "draft-small" else 12
        config = t.Qwen3Config(**COMMON, **sizes, num_hidden_layers=layers, num_key_value_heads=4, head_dim=128)
        model: Any = t.Qwen3ForCausalLM(config)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.q_norm.weight.fill_(2.0)
                layer.self_attn.k_norm.weight.fill_(1.0)
                layer.self_attn.o_proj.weight.mul_(6.0)
                layer.mlp.down_proj.weight.mul_(0.3)
    elif kind == "mla":
        config = t.DeepseekV2Config(
            **COMMON,
            **{**sizes, "num_attention_heads": 16},
            num_hidden_layers=8,
            num_key_value_heads=16,
            moe_intermediate_size=256,
            q_lora_rank=None,
            kv_lora_rank=512,
            qk_rope_head_dim=64,
            qk_nope_head_dim=128,
            v_head_dim=128,
            head_dim=64,
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            first_k_dense_replace=99,
            topk_method="greedy",
            n_group=1,
            topk_group=1,
            rope_scaling={
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
        )
        model = t.DeepseekV2ForCausalLM(config)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.q_proj.weight.mul_(3.0)
                layer.self_attn.o_proj.weight.mul_(6.0)
                layer.mlp.down_proj.weight.mul_(0.3)
    elif kind == "kv+swa":
        config = t.MellumConfig(
            **COMMON,
            **sizes,
            moe_intermediate_size=256,
            num_hidden_layers=8,
            num_key_value_heads=4,
            head_dim=128,
            sliding_window=128,
            layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 2,
            mlp_layer_types=["dense"] * 8,
            num_experts=4,
            num_experts_per_tok=2,
        )
        model = t.MellumForCausalLM(config)
        with torch.no_grad():
            for number, layer in enumerate(model.model.layers):
                layer.self_attn.q_norm.weight.fill_(2.0)
                layer.self_attn.k_norm.weight.fill_(1.0)
                layer.self_attn.o_proj.weight.mul_(20.0 if number % 4 == 3 else 6.0)
                layer.mlp.down_proj.weight.mul_(0.3)
    elif kind == "kv+mamba":
        config = t.Qwen3NextConfig(
            **COMMON,
            **sizes,
            moe_intermediate_size=256,
            shared_expert_intermediate_size=256,
            num_hidden_layers=8,
            num_key_value_heads=2,
            head_dim=128,
            linear_num_value_heads=8,
            linear_num_key_heads=4,
            linear_key_head_dim=128,
            linear_value_head_dim=128,
            linear_conv_kernel_dim=4,
            num_experts=4,
            num_experts_per_tok=2,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 2,
        )
        model = t.Qwen3NextForCausalLM(config)
        with torch.no_grad():
            for layer in model.model.layers:
                if hasattr(layer, "self_attn"):
                    layer.self_attn.q_norm.weight.fill_(2.0)
                    layer.self_attn.k_norm.weight.fill_(1.0)
                    layer.self_attn.o_proj.weight.mul_(8.0)
                else:
                    layer.linear_attn.out_proj.weight.mul_(6.0)
                    layer.linear_attn.A_log.fill_(-3.0)
                layer.mlp.shared_expert.down_proj.weight.mul_(0.3)
                layer.mlp.experts.down_proj.mul_(0.3)
    else:
        raise SystemExit(f"no model of kind {kind}")
    model.to(torch.bfloat16).save_pretrained(directory)
    if kind == "kv+mamba":  # a field that SGLang reads and transformers does not write
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "full_attention_interval": 4}))


def prompt(name: str, count: int, vocabulary: int = 1000) -> list[int]:
    """Token ids that only depend on the arguments; a trailing `~` changes the first 16."""
    if name.endswith("~"):
        return [*prompt("another", 16, vocabulary), *prompt(name[:-1], count, vocabulary)[16:]]
    generator = random.Random(name)
    return [generator.randrange(3, vocabulary) for _ in range(count)]


class Server:
    """An engine, and what is asked of it."""

    def __init__(self, options: dict[str, Any]) -> None:
        import sglang

        begun = time.perf_counter()
        self.engine = sglang.Engine(**options)
        self.start_s = time.perf_counter() - begun

    def ask(self, ids: list[int], tokens: int) -> dict[str, Any]:
        """One request, alone."""
        begun = time.perf_counter()
        answer: Any = self.engine.generate(
            input_ids=ids,
            sampling_params={"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
            return_logprob=tokens > 1,
        )
        took = time.perf_counter() - begun
        meta = answer["meta_info"]
        return {
            "ids": answer["output_ids"],
            "logprobs": [row[0] for row in meta.get("output_token_logprobs") or []],
            "cached": {k: v for k, v in (meta.get("cached_tokens_details") or {}).items() if isinstance(v, int)},
            "accepted": meta.get("spec_accept_length"),
            "ms": took * 1e3,
        }

    def counts(self) -> dict[str, Any]:
        """What the tier counted."""
        states = self.engine.get_server_info()["internal_states"]
        state: dict[str, Any] = (states[0].get("sglang_xmem") or {}).get("counts", {})
        return state


def check(kind: str, tier: str, model: Path, gpu: bool) -> dict[str, Any]:
    """Compare a tier hit with a device hit, bit by bit."""
    page = 1 if kind == "kv+mamba" else 64 if gpu else 16
    whole = 64 if kind == "kv+mamba" else 1152 if gpu else 384
    tail = 14
    pool = 6 * whole
    options = engine_options(kind, tier, gpu, page)
    options.update(model_path=str(model), max_total_tokens=pool, context_length=8192)
    if gpu:
        options["attention_backend"] = "triton"  # nothing to compile first; what is compared are bits
    if kind == "draft":
        options["speculative_draft_model_path"] = str(model.parent / "draft-small")
    server = Server(options)
    # A state of a linear-attention model exists at a node's end only, so its prompts have to extend each other.
    first, asked = prompt("A", whole + 16), [*prompt("A", whole + 16), *prompt("more", tail)]
    if kind != "kv+mamba":
        first = asked = prompt("A", whole + tail)
    changed = [*prompt("A~", whole + 16), *prompt("more", tail)] if kind == "kv+mamba" else prompt("A~", whole + tail)
    try:
        server.ask(first, 8)
        server.ask(asked, 8)
        hit = server.ask(asked, 8)
        before = server.counts()
        hits, after_first = [], before
        for rounds in range(3):
            for number in range(pool // whole + 2):
                server.ask(prompt(f"flood{rounds}.{number}", whole + tail), 1)
            hits.append(server.ask(asked, 8))
            after_first = server.counts() if rounds == 0 else after_first
        other = server.ask(changed, 8)
        counts = server.counts()
    finally:
        server.engine.shutdown()
    loads = counts.get("copies:load", 0) - before.get("copies:load", 0)
    return {
        "equal": all(each["ids"] == hit["ids"] and each["logprobs"] == hit["logprobs"] for each in hits),
        "from_tier": [each["cached"].get("host", 0) for each in hits],
        "from_device": hit["cached"].get("device", 0),
        "prompt_tokens": len(asked),
        "prefix_matters": other["ids"] != hit["ids"],
        "accepted": {"hbm": hit["accepted"], "tier": [each["accepted"] for each in hits]},
        "launches_per_load": None if not loads else 1 if not counts.get("fallbacks:layers") else "by layers",
        "first_enqueue_us": enqueue_us(before, after_first),
        "enqueue_us": enqueue_us(after_first, counts),
        "counts": counts,
        "start_s": round(server.start_s, 1),
    }


def ttft(kind: str, shape: Path, tier: str, tokens: int, rounds: int) -> dict[str, Any]:
    """Time hits of a long prompt in the tier and in HBM."""
    page = 64
    options = engine_options(kind, tier, True, page)
    for name in ("page_size", "max_mamba_cache_size", "hicache_ratio", "mamba_radix_cache_strategy"):
        if kind == "kv+mamba":
            options.pop(name, None)
    vocabulary = json.loads((shape / "config.json").read_text())["vocab_size"]
    options.update(
        model_path=str(shape),
        load_format="dummy",
        page_size=page,
        max_total_tokens=tokens + 33 * 1024,
        context_length=tokens + 4096,
        hicache_size=0,
        hicache_ratio=3.0,
        cuda_graph_max_bs_prefill=256,
    )
    if kind == "kv+mamba":
        options.update(mamba_radix_cache_strategy="extra_buffer", disable_overlap_schedule=False)
    server = Server(options)
    asked = prompt("A", tokens + 50, vocabulary)
    hbm, hits = [], []
    after_first: dict[str, int] = {}
    try:
        server.ask(prompt("warm", tokens // 8, vocabulary), 1)
        server.ask(asked, 1)
        before = server.counts()
        for number in range(rounds):
            for other in range(3):
                server.ask(prompt(f"other{number}.{other}", 8192, vocabulary), 1)
            hbm.append(server.ask(asked, 1))
            for other in range(tokens // 8192 + 6):
                server.ask(prompt(f"flood{number}.{other}", 8192, vocabulary), 1)
            hits.append(server.ask(asked, 1))
            after_first = server.counts() if number == 0 else after_first
        counts = server.counts()
    finally:
        server.engine.shutdown()
    proven = [each["ms"] for each in hits if each["cached"].get("host", 0) > 0.9 * tokens]
    in_hbm = [each["ms"] for each in hbm if each["cached"].get("device", 0) > 0.9 * tokens]
    return {
        "prompt_tokens": len(asked),
        "tier_ms": [round(ms, 2) for ms in proven],
        "hbm_ms": [round(ms, 2) for ms in in_hbm],
        "tier_median_ms": round(statistics.median(proven), 2) if proven else None,
        "hbm_median_ms": round(statistics.median(in_hbm), 2) if in_hbm else None,
        "cached": [each["cached"] for each in hits],
        "first_enqueue_us": enqueue_us(before, after_first),
        "enqueue_us": enqueue_us(after_first, counts),
        "counts": counts,
        "start_s": round(server.start_s, 1),
    }


def enqueue_us(before: dict[str, int], after: dict[str, int]) -> float | None:
    """The scheduler thread's time per load between two counts; the first load of a kind compiles its program."""
    loads, nanoseconds = (after.get(name, 0) - before.get(name, 0) for name in ("copies:load", "enqueue_ns:load"))
    return nanoseconds / 1e3 / loads if loads else None


def engine_options(kind: str, tier: str, gpu: bool, page: int) -> dict[str, Any]:
    """Options of an engine."""
    options: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "page_size": page,
        "max_running_requests": 8,
        "chunked_prefill_size": 8192 if gpu else 512,
        "random_seed": 0,
        "log_level": "info",
        "enable_hierarchical_cache": True,
        "hicache_ratio": 4.0,
        "hicache_write_policy": "write_through",
        **KINDS[kind.removesuffix(FP8)],
        **TIERS[tier],
    }
    if kind.endswith(FP8):
        options["kv_cache_dtype"] = "fp8_e4m3"
    if gpu:
        options.update(disable_decode_cuda_graph=True)
    else:
        options.update(
            device="cpu", attention_backend="torch_native", sampling_backend="pytorch", disable_overlap_schedule=True
        )
    return options


def worker(arguments: argparse.Namespace) -> None:
    """Run one engine and print its row."""
    import torch

    gpu = torch.cuda.is_available()
    if arguments.mode == "check":
        facts = check(arguments.kind, arguments.tier, Path(arguments.model), gpu)
    else:
        facts = ttft(arguments.kind, Path(arguments.model), arguments.tier, arguments.tokens, arguments.rounds)
    facts["gpu"] = torch.cuda.get_device_name(0) if gpu else "cpu"
    print("ROW " + json.dumps(facts), flush=True)


def main() -> None:
    """Run all engines that were asked for; one JSON line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", choices=("check", "ttft"), default="check")
    parser.add_argument("--kinds", default="mha,mla,kv+swa,kv+mamba,draft")
    parser.add_argument("--tiers", default="dram,peer")
    parser.add_argument("--shapes", default="", help="ttft: KIND=CONFIG_FOLDER, comma separated")
    parser.add_argument("--tokens", type=int, default=81920)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--models", default="/tmp/pool-models")
    parser.add_argument("--limit", type=int, default=200, help="seconds per engine")
    parser.add_argument("--output", required=True)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    for name in ("kind", "tier", "model"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments)
        return
    failed = False
    shapes = dict(item.split("=", 1) for item in arguments.shapes.split(",") if item)
    for kind in shapes if arguments.mode == "ttft" else arguments.kinds.split(","):
        name = kind.split(":")[0]
        if arguments.mode == "check":
            plain = kind.removesuffix(FP8)
            model = Path(arguments.models) / plain
            wanted = [plain, "draft-small"] if plain == "draft" else [plain]
            for each in wanted:
                if not (model.parent / each / "config.json").exists():
                    code = (
                        f"import sys; sys.path.insert(0, {str(HERE.parent)!r}); import pools, pathlib; "
                        f"pools.make_model({each!r}, pathlib.Path({str(model.parent / each)!r}))"
                    )
                    subprocess.run([sys.executable, "-c", code], check=True)
        else:
            model = Path(shapes[kind])
        for tier in arguments.tiers.split(","):
            command = [sys.executable, str(HERE), "--worker", "--mode", arguments.mode, "--kind", name, "--tier", tier]
            command += ["--model", str(model), "--output", arguments.output]
            command += ["--tokens", str(arguments.tokens), "--rounds", str(arguments.rounds)]
            log = Path(arguments.output).with_suffix(f".{kind.replace('+', '-').replace(':', '-')}.{tier}.log")
            begun = time.time()
            with log.open("w") as out:
                process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
                try:
                    process.wait(arguments.limit)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, 9)  # its own session: the engine and its children
            lines = [line[4:] for line in log.read_text(errors="replace").splitlines() if line.startswith("ROW ")]
            row: dict[str, Any] = {"bench": "pools", "mode": arguments.mode, "kind": kind, "tier": tier}
            row["command"] = " ".join(sys.argv)
            if lines:
                row.update(json.loads(lines[-1]))
            else:
                row["error"] = log.read_text(errors="replace")[-1500:]
                failed = True
            row["wall_s"] = round(time.time() - begun, 1)
            with open(arguments.output, "a") as file:
                file.write(json.dumps(row) + "\n")
            shown = {k: v for k, v in row.items() if k not in ("counts", "command", "error")}
            print(json.dumps(shown), (row.get("error") or "")[-600:], flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
