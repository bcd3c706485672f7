#!/usr/bin/env python3
"""The page bank's kill matrix in engines on the CPU; every answer is compared with that of an engine without a cache.

    python scripts/bench/bank_kills.py --model DIRECTORY --rounds 3 --output docs/results/faults.jsonl

DIRECTORY is what scripts/make_tiny_model.py makes. Each kill of an engine costs a start of one.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.e2e import kill_matrix


def main() -> int:
    """Append a row per cell; 1 where an answer was wrong, or a request hung or was lost though its engine lives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="directory of a model")
    parser.add_argument("--rounds", type=int, default=3, help="kills of each cell; default 3")
    parser.add_argument("--victims", default=",".join(kill_matrix.VICTIMS), help="comma separated; default all")
    parser.add_argument("--phases", default=",".join(kill_matrix.PHASES), help="comma separated; default all")
    parser.add_argument("--seed", type=int, default=0, help="of the times of kills")
    parser.add_argument("--output", type=Path, default=Path("faults.jsonl"), help="JSON Lines file to append to")
    arguments = parser.parse_args()
    command = "python scripts/bench/bank_kills.py --model MODEL " + " ".join(
        f"--{name} {getattr(arguments, name)}" for name in ("rounds", "seed", "victims", "phases")
    )
    failed = False
    with tempfile.TemporaryDirectory() as scratch, arguments.output.open("a") as file:
        matrix = kill_matrix.Matrix(arguments.model, Path(scratch), arguments.rounds, arguments.seed)
        for row in matrix.run(arguments.victims.split(","), arguments.phases.split(",")):
            text = json.dumps({"bench": "bank_kills", **row._asdict(), "device": "cpu", "command": command})
            print(text, flush=True)
            file.write(text + "\n")
            file.flush()
            failed |= bool(row.wrong or row.hung or (row.victim == "service" and row.lost_requests))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
