#!/usr/bin/env python3
"""What each fault of a tier does to requests, in engines on the CPU; every answer is compared with an uncached one.

    python scripts/bench/faults.py --model DIRECTORY --rounds 3 --output docs/results/faults.jsonl

DIRECTORY is what scripts/make_tiny_model.py makes. The faults are those of tests/fakes/faults.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.e2e import fault_matrix


def main() -> int:
    """Append a row per fault and state; 1 where an answer was wrong or a request hung."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of a model")
    parser.add_argument("--rounds", type=int, default=3, help="prompts of each fault; default 3")
    parser.add_argument("--output", type=Path, default=Path("faults.jsonl"), help="JSON Lines file to append to")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows, _ = fault_matrix.survived(arguments.model, arguments.rounds, Path(scratch))
        rows.append(fault_matrix.hang(arguments.model, 5, Path(scratch))[0])
    command = f"python scripts/bench/faults.py --model MODEL --rounds {arguments.rounds}"
    with arguments.output.open("a") as file:
        for row in rows:
            text = json.dumps({"bench": "faults", **row._asdict(), "device": "cpu", "command": command})
            print(text)
            file.write(text + "\n")
    return int(any(row.wrong or row.hung for row in rows))


if __name__ == "__main__":
    sys.exit(main())
