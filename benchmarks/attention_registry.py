"""Measures every attention backend on the shapes of DiT, and keeps the file that `attention="auto"` chooses by.

    python benchmarks/attention_registry.py            # fastdit/attention/<gpu>.json

The heads of S, B, L and XL in bfloat16, batches 1 to 256 as `auto` asks for them (rounded up to a power of two, with
guidance doubled), inference, training, and training in any order: 256, 1024 and 4096 tokens (images of 256, 512 and
1024 pixels), 258 (256 and the two tokens of the in-context block), and 256 to the 2 tokens of the cross-attention
block. The file is written after every shape. A backend whose numbers are wrong is not recorded; other tokens, dtypes
and sizes are for `fastdit bench attention --save`. Needs torch, numpy and this source tree.
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

HEADS = ((16, 72), (16, 64), (12, 64), (6, 64))  # and head_dim, of XL, L, B and S
TOKENS = (
    (256, None),
    (1024, None),
    (256, 2),
    (258, None),
    (4096, None),
)  # and keys, None for as many
BATCHES = tuple(2**i for i in range(9))
LARGEST_ELEMENTS = 2**29  # of one of q, k and v
LARGEST_WEIGHTS = (
    2**33
)  # of the softmax, in all heads: the time grows with them, and plain torch keeps them


def shapes() -> list[list[attention.Case]]:
    """The cases of a shape, for each; without those that are too large."""
    return [
        [
            attention.Case(n, tokens, heads, k, keys)
            for n in BATCHES
            if n * tokens * heads * k <= LARGEST_ELEMENTS
            and n * heads * tokens * (keys or tokens) <= LARGEST_WEIGHTS
        ]
        for tokens, keys in TOKENS
        for heads, k in HEADS
    ]


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
    cases = shapes()
    if options.small:
        cases = [[attention.Case(2, 16, 2, 72, keys=2, dtype=torch.float32)]]
    for of_shape in cases:
        rows = attention.measure(ops.attention, of_shape, device=device)
        target = registry.save(
            device_name(device),
            [(row.key, row.backend, row.seconds) for row in rows if row.seconds is not None],
            options.output,
        )
        for row in rows:
            time = row.reason if row.seconds is None else f"{1e6 * row.seconds:10.1f} us"
            print(*row.case[:5], row.direction, row.backend, time, sep="  ", flush=True)
    print(target)


if __name__ == "__main__":
    main()
