"""Labels of a rank's metrics: replicas and ranks of one engine must not share a series."""

from __future__ import annotations

import os

import pytest

from tests.pools import factories


@pytest.mark.skipif(os.environ.get("SGLANG_USE_CPU_ENGINE") != "1", reason="configures SGLang for a CPU")
@pytest.mark.parametrize(("dp_rank", "label"), [(None, "0"), (0, "0"), (1, "1")])
def test_ranks_have_labels_of_their_own(dp_rank: int | None, label: str) -> None:
    pytest.importorskip("sglang")
    from sglang.srt.runtime_context import get_parallel

    from sglang_xmem.engines.sglang.scheduler import _labels

    with factories.configured(served_model_name="m"), get_parallel().override(dp_rank=dp_rank):
        assert _labels() == {"model_name": "m", "tp_rank": "0", "pp_rank": "0", "dp_rank": label}
