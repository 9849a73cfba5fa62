"""Dense attention of a prompt's last tokens in one layer, flash kernel or mask: python benchmarks/dense_end.py -o FILE"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from environment import environment
from torch import Tensor

from rtpurbo.checkpoint import write_json
from rtpurbo.evals.layer_speed import call_seconds
from rtpurbo.ops import dense_attention

SHAPES = ((14, 2, 64), (32, 8, 128), (32, 4, 128))
"""Query heads, KV heads, head dimension."""
REPEATS = 20


def seconds(function: Callable[[], Tensor]) -> float:
    """Median GPU time of a call, launched from Python as a model does."""
    function()
    return statistics.median(call_seconds(function, torch.device("cuda")) for _ in range(REPEATS))


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384, 32768, 131072])
    parser.add_argument("--ends", type=int, nargs="+", default=[128, 2048])
    parser.add_argument("--commit")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    rows = []
    for query_heads, kv_heads, dim in SHAPES:
        for tokens in args.tokens:
            k, v = torch.randn(2, 1, kv_heads, tokens, dim, device="cuda", dtype=torch.bfloat16)
            real = torch.ones(1, tokens, dtype=torch.bool, device="cuda")  # padding, of which there is none, needs the mask
            for end in args.ends:
                q = torch.randn(1, query_heads, end, dim, device="cuda", dtype=torch.bfloat16)

                def run(real: Tensor | None = None, q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
                    return dense_attention(q, k, v, scaling=q.shape[-1] ** -0.5, real=real)

                row = {"shape": f"{query_heads}/{kv_heads}/{dim}", "tokens": tokens, "end_tokens": end}
                row |= {"difference": float((run() - run(real)).abs().max())}
                row |= {"flash_seconds": seconds(run), "mask_seconds": seconds(lambda run=run, real=real: run(real))}
                rows.append(row)
                print(row, flush=True)
    write_json(args.output, {"environment": environment(args.commit), "repeats": REPEATS, "rows": rows})


if __name__ == "__main__":
    main()
