"""The kinds of pools that SGLang's CPU engine can run, with what each needs and what a hit in the tier has to move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.e2e.harness import LONGER, OTHER_PREFIX, PROMPT_TOKENS, Load, Spec, Step


@dataclass(frozen=True)
class Kind:
    """One model's way through cold, hit in the device pool, flood, hit in the tier, and hits that lack a pool.

    Attributes:
        model: arguments of make_tiny_model.py.
        loads: what the load of a hit moves, by SGLang's names of pools: tokens, or states.
        options: keywords of sgl.Engine, over harness.BASE_OPTIONS.
        draft: the model is its own draft; its pools are named in `drafts`.
        drafts: pools that outputs do not depend on, because drafts are verified.
        drafts_right: some drafts of a right pool are right, so a wrong one shows in the number of verifications.
        prompt_tokens: of the first prompt.
        extend: later prompts are the first one with more tokens, for models whose pools hold states at the ends of
            nodes alone: an equal prompt matches one token less than the node has.
        hit: tokens that a hit finds.
    """

    model: tuple[str, ...]
    loads: Mapping[str, int]
    options: Mapping[str, Any] = field(default_factory=dict)
    draft: bool = False
    drafts: tuple[str, ...] = ()
    drafts_right: bool = False
    prompt_tokens: int = PROMPT_TOKENS
    extend: bool = False
    hit: int = (PROMPT_TOKENS - 1) // 16 * 16

    def steps(self, controls: bool = True) -> list[Step]:
        """Steps of a run; `controls` are hits with each pool's load left out, named "without POOL"."""
        again = f"A{LONGER}" if self.extend else "A"
        steps: list[Step] = [
            ("ask", "cold", "A"),
            ("ask", "device_hit", again),
            ("ask", "device_hit_again", again),
            ("flood",),
            ("ask", "tier_hit", again),
            ("ask", "changed", f"A{OTHER_PREFIX}{LONGER}" if self.extend else f"A{OTHER_PREFIX}"),
        ]
        for pool in self.loads if controls else ():
            steps += [("flood",), ("leave_out", pool), ("ask", f"without {pool}", again), ("leave_out",)]
        return steps

    def spec(self, model: str, options: Mapping[str, Any], environment: Mapping[str, str], **steps: Any) -> Spec:
        """A run of this kind: `options` go over the kind's own."""
        own = dict(self.options)
        if self.draft:
            own["speculative_draft_model_path"] = model
        return Spec(
            "engine",
            model,
            {**own, **options},
            self.steps(**steps),
            environment,
            prompt_tokens=self.prompt_tokens,
            forked=True,
        )


#: A chain of three drafts.
DRAFTS: Mapping[str, Any] = {
    "speculative_num_steps": 3,
    "speculative_eagle_topk": 1,
    "speculative_num_draft_tokens": 4,
}

KINDS: Mapping[str, Kind] = {
    "mha": Kind(("--kind", "mha"), {"kv": 384}),
    "mla": Kind(("--kind", "mla"), {"kv": 384}),
    # The indexer's keys come in rows of 64 tokens.
    "dsa": Kind(("--kind", "dsa"), {"kv": 384, "indexer": 384}, {"page_size": 64}),
    # The host pool of windows is as small as that of the device; a flood that fills it would lose the whole hit.
    "swa": Kind(("--kind", "swa"), {"kv": 384, "swa": 64}, {"hicache_ratio": 12.0}),
    "asymmetric": Kind(("--kind", "asymmetric"), {"kv": 384, "swa": 64}, {"hicache_ratio": 12.0}),
    # A load restores the state of the tree's node and that of the request. SGLang has states on a CPU with pages of
    # one token alone, and the stand-ins compute token by token: short prompts.
    "gdn": Kind(
        ("--kind", "gdn"),
        {"kv": 80, "mamba": 2},
        {
            "page_size": 1,
            "max_total_tokens": 256,
            "mamba_radix_cache_strategy": "no_buffer",
            "max_mamba_cache_size": 12,
            "hicache_ratio": 8.0,
        },
        prompt_tokens=80,
        extend=True,
        hit=80,
    ),
    # The draft is the model itself. It does not see the first token, which changes what a sharper model says; with this
    # one half of its drafts are right as long as its K and V are, and none without.
    "draft": Kind(
        ("--kind", "mha", "--sharpness", "2"),
        {"kv": 384, "draft": 384},
        {**DRAFTS, "speculative_algorithm": "STANDALONE"},
        draft=True,
        drafts=("draft",),
        drafts_right=True,
    ),
    # The layer that drafts is a further layer of the target's host pool.
    "mtp": Kind(
        ("--kind", "mtp"),
        {"kv": 384, "kv+draft": 384},
        {**DRAFTS, "speculative_algorithm": "EAGLE"},
        drafts=("kv+draft",),
    ),
}


def loads_of(loads: Sequence[Load], kind: Kind) -> list[Load]:
    """Those of a log's loads that are a hit of this kind."""
    return [load for load in loads if load.moved == kind.loads]
