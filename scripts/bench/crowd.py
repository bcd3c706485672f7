#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Takes all memory that is left on a GPU, and keeps it busy, until it is killed: crowd.py GPU

Without a GPU's number it takes a GB of host memory. Says so on stdout when it has begun.
"""

from __future__ import annotations

import sys

import torch

#: Matrices of the load, n x n.
MATRIX = 4096
HOST_BYTES = 10**9


def main() -> None:
    """Crowd."""
    gpu = sys.argv[1] if len(sys.argv) > 1 else ""
    device = torch.device("cuda", int(gpu)) if gpu else torch.device("cpu")
    size = MATRIX if gpu else MATRIX // 16
    matrix = torch.randn(size, size, device=device)
    torch.mm(matrix, matrix)
    held: list[torch.Tensor] = []
    piece = (1 << 30) if gpu else HOST_BYTES
    while piece >= 1 << 20 and (gpu or not held):
        try:
            held.append(torch.full((piece,), 0x5A, dtype=torch.uint8, device=device))
        except torch.OutOfMemoryError:
            piece //= 2
    print(f"{sum(map(len, held)) / 1e9:.1f} GB of {device} are in use", flush=True)
    while True:
        for _ in range(100):
            torch.mm(matrix, matrix)
        if gpu:
            torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
