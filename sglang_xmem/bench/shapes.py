"""Model shapes for benchmarks: a configuration to run with dummy weights, so that nothing is downloaded.

`shapes/NAME.json` are the models' published config.json files, but for `qwen3-next-small`, which has 64 of 512 experts
so that it fits one GPU of 80 GB, as the others do in bf16.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sglang_xmem.errors import ConfigError

#: By name: what `--shape`'s help says of each.
SHAPES = {
    "qwen3-30b-a3b": "K and V, 98 kB a token",
    "qwen3-8b": "K and V, 147 kB a token",
    "llama-3.1-8b": "K and V, 131 kB a token",
    "deepseek-v2-lite": "MLA, 31 kB a token",
    "qwen3-next-small": "linear (GDN) and full attention, 25 kB a token and a state of 77 MB a prefix",
    "gpt-oss-20b": "sliding windows and full attention, 25 kB a token",
    "tiny": "for machines without a GPU",
}


def config_of(name: str) -> dict[str, Any]:
    """A shape's config.json; of NAME/4 with a quarter of the layers, for contexts that a machine has no memory for.

    Raises:
        ConfigError: there is no such shape.
    """
    shape, _, part = name.partition("/")
    divisor = int(part) if part.isascii() and part.isdigit() else 0 if part else 1
    if shape not in SHAPES or divisor < 1:
        raise ConfigError(f"--shape {name} is not a shape. Choose from {', '.join(SHAPES)}, or NAME/4 for a quarter.")
    config: dict[str, Any] = json.loads((Path(__file__).with_name("shapes") / f"{shape}.json").read_text())
    layers, every = config["num_hidden_layers"], config.get("full_attention_interval", 1)
    if layers % (divisor * every):
        raise ConfigError(f"--shape {name} has no whole layers: {shape} has {layers} in groups of {every}.")
    config["num_hidden_layers"] //= divisor
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][: config["num_hidden_layers"]]
    return config


def write_shape(name: str, folder: Path) -> Path:
    """Write a shape's config.json and a tokenizer of as many words into a folder of its own under `folder`.

    Returns:
        that folder, as --model-path takes it.
    """
    path = folder / name.replace("/", "-")
    path.mkdir(parents=True, exist_ok=True)
    config = config_of(name)
    model = {"type": "WordLevel", "vocab": {f"t{n}": n for n in range(config["vocab_size"])}, "unk_token": "t0"}
    tokenizer: dict[str, Any] = {"version": "1.0", "added_tokens": [], "model": model}
    tokenizer["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    for missing in ("truncation", "padding", "normalizer", "post_processor", "decoder"):
        tokenizer[missing] = None
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "t0", "eos_token": "t2"}
    for file, content in (("config", config), ("tokenizer", tokenizer), ("tokenizer_config", about)):
        (path / f"{file}.json").write_text(json.dumps(content))
    return path
