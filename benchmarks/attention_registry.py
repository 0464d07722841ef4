"""Measures every attention backend on the shapes of DiT, and keeps the file that `attention="auto"` chooses by.

    python benchmarks/attention_registry.py            # fastdit/attention/<gpu>.json

S, B, L and XL (heads of 64 and of 72) at 256 and 1024 tokens, in bfloat16, batches 2 to 256, inference, training, and
training in any order. A backend whose numbers are wrong is not recorded. Needs torch, numpy and this source tree.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

if not __package__:  # started as a file: the packages lie in the folder above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from fastdit import attention, ops
from fastdit.attention import registry
from fastdit.attention.registry import device_name

SHAPES = [
    (tokens, heads, k)
    for tokens in (256, 1024)
    for heads, k in ((16, 72), (16, 64), (12, 64), (6, 64))
]
BATCHES = (2, 8, 32, 64, 128, 256)
LARGEST_ELEMENTS = 2**29  # of one of q, k and v


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--small", action="store_true", help="one tiny shape, to try the program")
    parser.add_argument(
        "--output", type=Path, default=registry.HERE, help="folder of the file (%(default)s)"
    )
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    device = torch.device("cuda:0" if options.device == "cuda" else "cpu")
    cases = [
        attention.Case(n, tokens, heads, k)
        for tokens, heads, k in SHAPES
        for n in BATCHES
        if n * tokens * heads * k <= LARGEST_ELEMENTS
    ]
    if options.small:
        cases = [attention.Case(2, 16, 2, 72, dtype=torch.float32)]
    rows = attention.measure(ops.attention, cases, device=device)
    target = registry.save(
        device_name(device),
        [(row.key, row.backend, row.seconds) for row in rows if row.seconds is not None],
        options.output,
    )
    for row in rows:
        time = row.reason if row.seconds is None else f"{1e6 * row.seconds:10.1f} us"
        print(*row.case[:4], row.direction, row.backend, time, sep="  ")
    print(target)


if __name__ == "__main__":
    main()
