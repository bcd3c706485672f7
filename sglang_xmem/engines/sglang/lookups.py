"""Where the pages of prompts were found, counted when SGLang admits their requests: some additions a request."""

from __future__ import annotations

from typing import Any

from sglang_xmem import session

#: Attribute of a request that was counted. Later parts of a long prompt, and requests that were put back, come again.
_COUNTED = "_sglang_xmem_counted"


def count(batch: Any, page_size: int) -> None:
    """Count the pages of the prompts that a batch of prefills begins with.

    Args:
        batch: SGLang's ScheduleBatch, or None.
        page_size: tokens of a page. What is left of a prompt behind its last whole page is not looked up.
    """
    counts = session.current().counts
    for req in batch.reqs if batch is not None else ():
        if hasattr(req, _COUNTED):
            continue
        setattr(req, _COUNTED, True)
        device, tier, storage = (
            tokens // page_size
            for tokens in (req.cached_tokens_device, req.cached_tokens_host, req.cached_tokens_storage)
        )
        counts["lookups:device"] += device
        counts["lookups:tier"] += tier
        counts["lookups:storage"] += storage
        counts["lookups:miss"] += max(0, len(req.origin_input_ids) // page_size - device - tier - storage)
