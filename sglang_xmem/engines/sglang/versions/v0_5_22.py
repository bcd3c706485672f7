"""SGLang 0.5.22, as it differs from 0.5.23."""

from dataclasses import replace

from sglang_xmem.engines.sglang.versions import v0_5_23

TABLE = replace(
    v0_5_23.TABLE,
    version="0.5.22",
    bank_hooks=(),
    # The controller sends its parent a fixed set of facts.
    controller_hooks=(),
    controller_reports=False,
)
