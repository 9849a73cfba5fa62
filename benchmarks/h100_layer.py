"""One attention layer on a GPU: `rtpurbo bench`, then its variants beside the same dense times.

python benchmarks/h100_layer.py OUT [--prefill-lengths ...]: writes OUT/h100_layer.json and OUT/h100_layer_variants.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from environment import environment

from rtpurbo.evals.layer_speed import LayerShape, bench_layer, decode_row, mixed, mode_shapes, prefill_row, prefill_shapes

K = 1024


def laddered(layer: LayerShape) -> LayerShape:
    """Every other local KV head with a quarter of the window."""
    local = layer.kv_rows[layer.full_rows :]
    windows = [layer.window_tokens] * layer.kv_heads
    for head in local[::2]:
        windows[head] //= 4
    return dataclasses.replace(layer, windows=tuple(windows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--shape", type=int, nargs=3, default=(32, 4, 128), help="query heads, KV heads, head dimension")
    parser.add_argument("--retrieval", type=int, nargs="+", default=(2, 5, 8, 11, 29))
    parser.add_argument("--window", type=int, default=8192)
    parser.add_argument("--lengths", type=int, nargs="+", default=(16 * K, 32 * K, 128 * K, 512 * K, 1024 * K))
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 8))
    parser.add_argument(
        "--prefill-lengths", type=int, nargs="+", default=[n * K for n in (12, 16, 32, 64, 128, 256, 512, 1024)]
    )
    parser.add_argument("--commit", default=None)
    args = parser.parse_args()
    begin = time.time()
    gpu = torch.cuda.is_available()
    place: dict[str, Any] = {
        "device": torch.device("cuda" if gpu else "cpu"),
        "dtype": torch.bfloat16 if gpu else torch.float32,
    }
    query_heads, kv_heads, head_dim = args.shape
    shape = LayerShape(
        query_heads=query_heads, kv_heads=kv_heads, head_dim=head_dim, retrieval=tuple(args.retrieval),
        window_tokens=args.window,
    )  # fmt: skip
    found = bench_layer(
        shape, tuple(args.lengths), tuple(args.batches), prefill_lengths=tuple(args.prefill_lengths), **place
    )
    about = environment(args.commit)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "h100_layer.json").write_text(
        json.dumps({"environment": about, "command": "benchmarks/h100_layer.py"} | found, indent=1)
    )
    for row in (*found["rows"], *found["prefill_rows"]):
        print(row["mode"], row["batch"], row["slots"], row.get("speedup"), row.get("shares"), row.get("refused"), flush=True)
    print(f"[{time.time() - begin:.0f} s]", flush=True)
    rows: list[dict[str, Any]] = []

    def put(variant: str, phase: str, mode: str, batch: int, slots: int, parts: list[tuple[float, dict[str, Any]]]) -> None:
        row = {"variant": variant, "phase": phase, "mode": mode, "batch": batch, "slots": slots} | mixed(parts)
        rows.append(row)
        print(variant, phase, mode, batch, slots, row["sparse_seconds"], row.get("speedup"), flush=True)
        text = json.dumps({"environment": about, "shape": dataclasses.asdict(shape), "rows": rows}, indent=1)
        (args.output / "h100_layer_variants.json").write_text(text)

    prefills = {
        "read by tile": (0.07, lambda layer: dataclasses.replace(layer, tile_probability=layer.min_probability)),
        "read by tile, half as much": (
            0.035,
            lambda layer: dataclasses.replace(layer, tile_probability=layer.min_probability),
        ),
        "ladder": (0.07, laddered),
        "ladder, read by tile": (
            0.07,
            lambda layer: dataclasses.replace(laddered(layer), tile_probability=layer.min_probability),
        ),
    }
    dense = {row["slots"]: row["parts"][0] for row in found["prefill_rows"] if "parts" in row}
    for slots in args.prefill_lengths:
        for variant, (far, change) in prefills.items():
            for mode in ("heads", "groups"):
                layers = prefill_shapes(shape, far)[mode]
                parts = [(w, prefill_row(change(x), slots, **place, repeats=3, dense=dense.get(slots))) for w, x in layers]
                put(variant, "prefill", mode, 1, slots, parts)
    for batch in args.batches:
        for slots in args.lengths:
            for mode, layers in mode_shapes(shape).items():
                small = [(w, dataclasses.replace(x, index_dtype="float8")) for w, x in layers]
                put("float8", "decode", mode, batch, slots, [(w, decode_row(x, batch, slots, **place)) for w, x in small])
    print(f"[{time.time() - begin:.0f} s]", flush=True)


if __name__ == "__main__":
    main()
