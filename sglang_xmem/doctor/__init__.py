"""`sglang-xmem doctor`: what this machine has for HiCache's pool, and which tier `auto` would use.

Changes nothing. The bandwidth measurement takes less than 10 s and uses 0.5 GB of each idle GPU; GPUs in use by others
are not touched. Exit status 0: a tier can hold the pool; 1: no tier can; 2: the server would refuse the options.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from sglang_xmem.config import AUTO, CONFIG_OPTION
from sglang_xmem.errors import ConfigError

#: Version of the JSON; raised when a key is removed or changes its meaning.
SCHEMA = 1

Json = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hicache-size",
        type=float,
        default=0,
        metavar="GB",
        help="as for the server: GB (1e9 bytes) per rank",
    )
    parser.add_argument("--tp-size", type=int, default=1, metavar="N", help="as for the server")
    parser.add_argument("--base-gpu-id", type=int, default=0, metavar="GPU", help="as for the server")
    parser.add_argument("--hicache-xmem-tier", default=AUTO, metavar="TIER", help="as for the server; default: auto")
    parser.add_argument(CONFIG_OPTION, default=None, metavar="JSON|@FILE", help="as for the server")
    parser.add_argument("--no-bandwidth", action="store_true", help="skip the bandwidth measurement")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the screen")


def run(args: argparse.Namespace) -> int:
    found = examine(args)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        from sglang_xmem.doctor import screen

        screen.show(found)
    return 0 if found["tiers"]["takes"] is not None else 1


def examine(args: argparse.Namespace) -> Json:
    """Collect everything, as described in docs/doctor.md.

    Raises:
        ConfigError: the server would refuse the options.
    """
    from sglang_xmem.doctor import facts, tiers

    if not 0 <= args.hicache_size < 1e9:
        raise ConfigError(
            f"--hicache-size must be >= 0 and < 1e9 (GB per rank; 0 = any size), got {args.hicache_size:g}."
        )
    engine = tiers.engine_gpus(args.tp_size, args.base_gpu_id)
    # The plan first: after a measurement, our own context on a GPU may still exist.
    pool_bytes = int(args.hicache_size * 1e9) or None
    verdict, banks = tiers.verdict(args.hicache_xmem_tier, args.hicache_xmem_config, engine, pool_bytes)
    versions = facts.versions()
    gpu_list, no_gpus = facts.gpu_list()
    peers = facts.peer_access([gpu["gpu"] for gpu in gpu_list])
    _add_bandwidth(gpu_list, peers, measured=not args.no_bandwidth)
    nodes = facts.numa_nodes()
    for node in nodes:
        node["gpus"] = [gpu["gpu"] for gpu in gpu_list if gpu["numa_node"] == node["node"]]
    return {
        "schema": SCHEMA,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions,
        "plugin": {"reason": facts.plugin_problem(versions["sglang"])},
        "driver": facts.driver(),
        "gpus": {"list": gpu_list, "reason": no_gpus},
        "peers": peers,
        "host": facts.host_memory(),
        "numa_nodes": nodes,
        "devdax": facts.devdax(),
        "xmem": {**facts.xmem(), "banks": banks["banks"], "reason": banks.get("reason")},
        "tiers": verdict,
    }


def _add_bandwidth(gpu_list: list[Json], peers: list[Json], measured: bool) -> None:
    """Add rates, or the reason for missing ones, to the rows of GPUs and pairs."""
    from sglang_xmem.doctor import bandwidth

    rows, problem = bandwidth.run() if measured and gpu_list else ([], "--no-bandwidth")
    by_link = {(row["gpu"], row["peer"]): row for row in rows}
    for target in [*gpu_list, *peers]:
        row = by_link.get((target["gpu"], target.get("peer")), {})
        rates = {key: row.get(key) for key in ("read_gbps", "write_gbps")}
        why = row.get("not_measured")
        if rates["read_gbps"] is None and why is None:
            why = "no peer access" if target.get("access") is False else problem or bandwidth.NO_TIME
        target.update({**rates, "not_measured": why})
