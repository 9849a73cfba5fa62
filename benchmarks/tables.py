"""Write the tables and the plot of README and docs from the JSON files in benchmarks/results: python benchmarks/tables.py"""

from __future__ import annotations

import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import study_tables
from study_tables import INK

from rtpurbo.checkpoint import Artifact
from rtpurbo.config import CalibrateConfig, DistillConfig, EvalConfig, IndexerConfig, SparseConfig
from rtpurbo.heads import HeadMap
from rtpurbo.memory import RESERVED_GIB, Shape, longest_documents, memory, with_length
from rtpurbo.pipeline import ConvertConfig
from rtpurbo.vllm_plugin.layout import memory_rows

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PLOT = ROOT / "docs" / "speed.svg"
LAYER = RESULTS / "h100_layer.json"


def smollm2() -> str:
    """The SmolLM2-135M artefact of this repository."""
    found = json.loads((RESULTS / "smollm2_8k_group.json").read_text())
    stages, environment, evaluation = found["stages"], found["environment"], found["evaluation"]
    main, seconds = evaluation["main"], found["seconds"]
    rule = SparseConfig(**{"min_probability": 0.0} | found["sparse"]).rule
    bench = json.loads((RESULTS / "smollm2_cpu_bench.json").read_text())
    at = bench["rows"][-1]
    names = {"single": "one fact hidden", "multi_key": "four facts, one asked", "multi_query": "four facts, two asked"}
    names["multi_value"] = "two facts of one name, both asked"
    needles = [
        (
            f"{names[row['kind']]}, {row['length_tokens']} tokens",
            f"{row['samples']} questions",
            f"{row['dense']:.1%}",
            f"{row['sparse']:.1%} ({' to '.join(f'{x:+.1%}' for x in row['difference_95'])})",
        )
        for part in ("main", "other")
        for row in evaluation[part]["needle"]
        if row["kind"] in ("single", "multi_key")
    ]
    losses = [
        (
            f"held-out loss, {what}",
            f"{row['documents']} documents of {row['length_tokens']}",
            f"{row['dense']:.3f}",
            f"{row['sparse']:.3f} ({row['recovery'] - 1:+.2%})",
        )
        for part, what in (("main", "novels"), ("code", "scikit-learn's source"))
        for row in evaluation[part]["loss"].values()
    ]
    index = [
        (what, f"{part['documents']} documents of {part['length_tokens']}", "100 %", f"{part[key]:.1%}")
        for key, what in (
            ("mass_kept", f"attention mass kept, {rule}"),
            ("far_selected_ratio", "far tokens selected"),
        )
        for part in (evaluation["main"]["index"],)
    ]
    rows = [
        *needles,
        *losses,
        *index,
        (
            "KV cache (bfloat16), measured",
            f"1 document of {main['settings']['lengths_tokens'][-1]}",
            *(f"{main['speed'][name]['cache_bytes'] / 1e6:.0f} MB" for name in ("dense", "sparse")),
        ),
        (
            f"decode (float32), tokens/s on {bench['environment']['device']}",
            f"1 document of {at['length_tokens']}",
            *(f"{at[name]['decode_tokens_per_second']:.1f}" for name in ("dense", "sparse")),
        ),
    ]
    misses = [
        f"one fact in {row['length_tokens']} tokens ({row['recovery']:.3f})"
        for row in main["needle"]
        if row["recovery"] < 0.97
    ] + [
        f"loss on {what} ({row['recovery'] - 1:+.2%})"
        for part, what in (("main", "novels"), ("code", "scikit-learn's source"))
        for row in evaluation[part]["loss"].values()
        if row["recovery"] > 1.007
    ]
    index_steps, settings = stages["train_indexer"]["settings"]["steps"], stages["distill"]["settings"]
    lines = ["| SmolLM2-135M, 8K, window 1024, 15 % of KV groups | samples | dense | sparse |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += [
        "",
        f"Decode: CPU; all else: one {environment['device']}, PyTorch {environment['torch']}, Transformers "
        f"{environment['transformers']}. Calibration took {seconds['calibrate']:.0f} s, {index_steps} index steps "
        f"{seconds['train_indexer']:.0f} s, {settings['steps']} distillation steps of {settings['batch_size']} documents "
        f"{seconds['distill']:.0f} s. In brackets: 95 % interval of the paired difference, or the difference.",
        "",
        "Aims were 0.97 of the dense model on single facts and at most 0.7 % more loss. "
        + (f"Missed: {', '.join(misses)}; [docs/log.md](docs/log.md) says what was tried." if misses else "All are met."),
    ]
    return "\n".join(lines)


def layer(found: dict[str, Any] | None = None) -> str:
    """One attention layer on a GPU, dense and sparse: `found`, by default that of the results."""
    found = json.loads(LAYER.read_text()) if found is None else found
    environment, shape = found["environment"], found["shape"]
    both = [*found["rows"], *found["prefill_rows"]]
    names = {"heads": f"{len(shape['retrieval'])} heads select", "groups": "15 % of KV groups select"}
    names["paper"] = f"{len(shape['retrieval'])} heads dense in prefill (paper)"
    modes = [mode for mode in names if any(row["mode"] == mode for row in both)]
    rates = any("sparse_tflops" in row or "sparse_tb_per_second" in row for row in both)
    traced = any(row.get("shares") for row in both)
    more = ["achieved, dense and sparse"] * rates + ["index and selection"] * traced
    header = ["best dense kernel", *(names[mode] for mode in modes), *more]
    lines = [f"| | {' | '.join(header)} |", "|---" * (1 + len(header)) + "|"]

    def sparse(row: dict[str, Any], time: str) -> str:
        gain = f" ({row['dense_seconds'] / row['sparse_seconds']:.1f}x)" if "dense_seconds" in row else ""
        return f"{row['sparse_seconds'] * unit:{time}}{gain}"

    def each(key: str, form: str, at: list[dict[str, Any]]) -> str:
        return " / ".join(f"{row[key]:{form}}" if row.get(key) is not None else "–" for row in at)

    for phase, rows, unit, rate in (
        ("decode", found["rows"], 1e6, ("tb_per_second", ".2f", "TB/s")),
        ("prefill", found["prefill_rows"], 1e3, ("tflops", ".0f", "TFLOP/s")),
    ):
        time, symbol = (".0f", "us") if unit == 1e6 else (".1f", "ms")
        for batch, slots in dict.fromkeys((row["batch"], row["slots"]) for row in rows):
            at = {row["mode"]: row for row in rows if (row["batch"], row["slots"]) == (batch, slots)}
            shown = [at[mode] for mode in modes if "sparse_seconds" in at.get(mode, {})]
            dense = next((row for row in shown if "dense_seconds" in row), None)
            cells = [f"{phase}, {slots // 1024}K" + (f", batch {batch}" if phase == "decode" else "")]
            cells.append(
                f"{dense['dense_seconds'] * unit:{time}} {symbol} ({dense['dense_backend']})" if dense else "refused"
            )
            for mode in modes:
                row = at.get(mode, {})
                cells.append(sparse(row, time) if "sparse_seconds" in row else "refused" if row else "–")
            key, form, name = rate
            if rates:
                cells.append(f"{each(f'dense_{key}', form, shown[:1])}, {each(f'sparse_{key}', form, shown)} {name}")
            if traced:
                cells.append(each("index", ".0%", [row.get("shares") or {} for row in shown]))
            lines.append(f"| {' | '.join(cells)} |")
    far = found["prefill_rows"][0]["parts"][0]["far_ratio"]
    lines += [
        "",
        f"One layer of {shape['query_heads']} query heads, {shape['kv_heads']} KV heads and {shape['head_dim']} dimensions, "
        f"window {shape['window_tokens']}, bfloat16, one {environment['device']}, PyTorch {environment['torch']}, Triton "
        f"{environment['triton']}, flash-attn-4 {environment['flash-attn-4']}; everything counted, index and selection too. "
        f"In decode a head selects {shape['far_ratio']:.0%} of the far tokens and a group three times as many; in prefill a "
        f"tile of positions reads {far:.0%}. These shares are replayed. `rtpurbo bench` measures the same on your GPU.",
    ]
    return "\n".join(lines)


SHOWN_TOKENS = tuple(n * 1024 for n in (32, 64, 128, 256, 512, 1024))


def speedups(*, variants: bool = False) -> str:
    """Times faster than the best dense kernel: a layer as it is, or its variants too."""
    found, more = json.loads(LAYER.read_text()), json.loads((RESULTS / "h100_layer_variants.json").read_text())
    heads = f"{len(found['shape']['retrieval'])} heads"
    names = {"heads": heads, "groups": "15 % of KV groups", "paper": f"{heads}, dense in prefill (the paper)"}
    kinds = {
        "float8": "index keys in float8",
        "read by tile": "read by tile",
        "read by tile, half as much": "read by tile, half as much",
        "ladder": "every other local KV head with a window of 2048",
        "ladder, read by tile": "both",
    }
    rows = [{"phase": "decode", "variant": None} | row for row in found["rows"]]
    rows += [{"phase": "prefill", "variant": None} | row for row in found["prefill_rows"]] + more["rows"]
    lines = [
        f"| times faster than the best dense kernel | {' | '.join(f'{n // 1024}K' for n in SHOWN_TOKENS)} |",
        "|---" * (1 + len(SHOWN_TOKENS)) + "|",
    ]
    kept = {(r["phase"], r["mode"], r["batch"], r["variant"], r["slots"]): r for r in rows if "speedup" in r}
    for phase, mode, batch in dict.fromkeys((row["phase"], row["mode"], row["batch"]) for row in rows):
        for variant in (None, *(kinds if variants else ())):
            found_at = [kept.get((phase, mode, batch, variant, slots)) for slots in SHOWN_TOKENS]
            if any(found_at):
                cells = [f"{row['speedup']:.1f}" if row else "" for row in found_at]
                what = f"{phase}, {names[mode]}" + (f", batch {batch}" if phase == "decode" else "")
                what += f": {kinds[variant]}" if variant else ""
                lines.append(f"| {what} | {' | '.join(cells)} |")
    if variants:
        return "\n".join(lines)
    shape, environment = found["shape"], found["environment"]
    single = json.loads((RESULTS / "h200_dense_end.json").read_text())["rows"]
    reading = json.loads((RESULTS / "h200_layer_reads.json").read_text())
    same = f"{shape['query_heads']}/{shape['kv_heads']}/{shape['head_dim']}"
    at_share = {
        (row["mode"], row["prefill_far_ratio"], row["slots"]): f"{row['speedup']:.1f}"
        for row in reading["rows"]
        if row["shape"] == same
    }
    dense = {row["dense_backend"] for row in reading["rows"] if row["shape"] == same}
    tiles = [row["selected_shares"]["prefill_tile"] for row in single if row["dense_end_tokens"] == 128]
    lines += [
        "",
        f"One layer of {shape['query_heads']} query heads, {shape['kv_heads']} KV heads and {shape['head_dim']} dimensions, "
        f"window {shape['window_tokens']}, one {environment['device']}, index and selection counted, against the fastest of "
        "SDPA's kernels and flash-attn-4 in the same run (FlashAttention-2 takes twice as long in "
        "prefill). Replayed shares: "
        f"in decode a head selects {shape['far_ratio']:.0%} of the far tokens, a group three times as many; in prefill a "
        "tile of positions reads 7 %. Real text, Qwen2.5-Coder-0.5B at 32K, least probability 0.0001: a "
        "group selects 1.9 (code) "
        "to 2.8 % (novels), a tile of 16 positions reads 13 to 21 % (`qwen25_coder_05b_reads.json`). Single heads of the "
        f"shipped artefact agree less: a tile reads {min(tiles):.0%} of the far tokens at 32K and {max(tiles):.0%} at 16K "
        "(`h200_dense_end.json`), so that their prefill gains less than here: with 60 % it is "
        f"{at_share['heads', 0.6, 32768]} times as fast at 32K and {at_share['heads', 0.6, 131072]} times at 128K, groups "
        f"with 20 % {at_share['groups', 0.2, 32768]} and {at_share['groups', 0.2, 131072]} times, on one "
        f"{reading['environment']['device']} against SDPA's {' and '.join(sorted(dense))} kernel "
        "(`h200_layer_reads.json`). Variants, times, rates and the share of the index: [docs/speed.md](docs/speed.md).",
    ]
    return "\n".join(lines)


def reads() -> str:
    """Prefill of a layer, by the share of the far tokens that a tile of positions reads."""
    found = json.loads((RESULTS / "h200_layer_reads.json").read_text())
    names = {"heads": "single heads", "groups": "KV groups"}
    at = {(row["shape"], row["mode"], row["prefill_far_ratio"], row["slots"]): row for row in found["rows"]}
    lengths = sorted({row["slots"] for row in found["rows"]})
    lines = [
        f"| prefill, a tile reads | share | {' | '.join(f'{n // 1024}K, times faster' for n in lengths)} |",
        "|---|---|" + "---|" * len(lengths),
    ]
    for shape, mode, share in dict.fromkeys((row["shape"], row["mode"], row["prefill_far_ratio"]) for row in found["rows"]):
        if mode in names:
            cells = [f"{at[shape, mode, share, n]['speedup']:.1f}" for n in lengths]
            lines.append(f"| {shape}, {names[mode]} | {share:.0%} | {' | '.join(cells)} |")
    windows = {row["shape"]: row["window_tokens"] for row in found["rows"]}
    kernels = " and ".join(found["rows"][0]["dense_by_kernel_seconds"])
    lines += [
        "",
        f"Query heads/KV heads/head dimension; windows {' and '.join(f'{n} ({shape})' for shape, n in windows.items())}; "
        f"one {found['environment']['device']}, against the faster of SDPA's {kernels}; flash-attn-4 was not there.",
    ]
    return "\n".join(lines)


def dense_ends() -> str:
    """The end of a prompt read densely in one layer, by the kernel that does it."""
    found = json.loads((RESULTS / "h200_dense_end_kernels.json").read_text())
    lines = ["| shape | tokens | dense at the end | flash kernel | mask |", "|---|---|---|---|---|"]
    for row in found["rows"]:
        times = (f"{row[key] * 1e3:.2f} ms" for key in ("flash_seconds", "mask_seconds"))
        lines.append(f"| {row['shape']} | {row['tokens']} | {row['end_tokens']} | {' | '.join(times)} |")
    environment = found["environment"]
    lines += ["", f"bfloat16, one {environment['device']}, PyTorch {environment['torch']}, median of {found['repeats']}."]
    return "\n".join(lines)


def end_to_end() -> str:
    """Whole models on a GPU, dense and sparse."""
    lines = [
        "| | first token, dense | sparse | GPU time per token, dense | sparse | cache, dense | sparse |",
        "|---|---|---|---|---|---|---|",
    ]
    by_clock: list[float] = []
    shipped = json.loads((RESULTS / "h200_dense_end.json").read_text())
    ends = {row["dense_end_tokens"]: row for row in shipped["rows"] if row["length_tokens"] > 30000}
    for name, file in (
        ("Qwen3-8B's shape, random weights", "h100_qwen3_8b_shape"),
        ("Qwen2.5-Coder-0.5B", "h100_qwen25_coder_05b"),
    ):
        found = json.loads((RESULTS / f"{file}.json").read_text())
        environment = found["environment"]
        by_clock += [row["tpot_seconds"] for row in found["rows"] if "tpot_seconds" in row]
        for length in dict.fromkeys(row["length_tokens"] for row in found["rows"]):
            at = {row["variant"]: row for row in found["rows"] if row["length_tokens"] == length and "ttft_seconds" in row}
            sparse, dense = at.pop("sparse"), list(at.values())

            def best(key: str, unit: float, form: str, symbol: str, dense=dense) -> str:
                return f"{min(row[key] for row in dense) * unit:{form}} {symbol}" if dense else "–"

            cells = [f"{name}, {length} tokens"]
            for key, unit, form, symbol in (
                ("ttft_seconds", 1.0, ".2f", "s"),
                ("tpot_gpu_seconds", 1e3, ".1f", "ms"),
                ("cache_bytes", 1e-9, ".2f", "GB"),
            ):
                cells += [best(key, unit, form, symbol), f"{sparse[key] * unit:{form}} {symbol}"]
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"One {environment['device']}, batch 1, Transformers {environment['transformers']}; dense: the faster of SDPA and "
        "flash-attn-4. 15 % of the KV groups select; the model of random weights replays 7 and 9 % of "
        "the far tokens, the real one "
        "(an index, not distilled) selects for itself on novels. The time of a token on the GPU is what "
        "an engine could reach: launched one by one from Python a token takes "
        f"{min(by_clock) * 1e3:.0f} to {max(by_clock) * 1e3:.0f} ms in all of them, and of the dense time up to half is "
        "Transformers copying its cache (`tpot_gpu_cat_seconds`). The shipped "
        f"`{shipped['settings']['artifact']}` (single heads, window 4096) took {ends[0]['ttft_seconds']:.3f} s for "
        f"{ends[0]['length_tokens']} tokens read sparsely to their end and {ends[128]['ttft_seconds']:.3f} s with 128 dense "
        f"tokens there, with a cache of {ends[128]['decode_cache_bytes'] / 1e9:.2f} GB while decoding, on one "
        f"{shipped['environment']['device']} beside other work (`h200_dense_end.json`); dense was not timed there, "
        "nor the flash kernel that reads this end now, in a quarter of the time ([docs/speed.md](docs/speed.md)).",
    ]
    return "\n".join(lines)


GPU_GIB = 24
EIGHT_B = ConvertConfig(
    window_tokens=4096,
    calibrate=CalibrateConfig(lengths_tokens=(8192, 12288)),
    indexer=IndexerConfig(length_tokens=16384, capture_gib=1.0),
    distill=DistillConfig(length_tokens=12288, batch_size=1),
    evaluate=EvalConfig(lengths_tokens=(8192, 16384)),
)
"""The setting of docs/memory.md for an 8B model on a GPU of 24 GB."""
SHAPES: dict[str, tuple[str, dict[str, int | bool]]] = {
    "Llama-3.1-8B": (
        "llama",
        {"vocab_size": 128256, "intermediate_size": 14336, "num_hidden_layers": 32, "max_position_embeddings": 131072},
    ),
    "Qwen3-8B": (
        "qwen3",
        {"vocab_size": 151936, "intermediate_size": 12288, "num_hidden_layers": 36, "max_position_embeddings": 40960},
    ),
}
"""Architecture and numbers of the models' published configurations."""


def shape_of(name: str) -> Shape:
    """The shape of one of SHAPES in bfloat16, from a model without memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, numbers = SHAPES[name]
    same = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    config = AutoConfig.for_model(kind, tie_word_embeddings=False, **same, **numbers)
    with torch.device("meta"):
        return Shape.of(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))


def memory_table() -> str:
    """What each stage takes for an 8B model: computed, nothing was run."""
    stages = ("calibrate", "train_indexer", "distill", "evaluate")
    lines = [f"| GiB, computed | tokens | weights | {' | '.join(stages)} |", "|---" * (3 + len(stages)) + "|"]

    def row(name: str, tokens: str, found: dict[str, str]) -> str:
        return f"| {name} | {tokens} | {found.get('weights', '')} | {' | '.join(found[stage] for stage in stages)} |"

    def computed(shape: Shape, config: ConvertConfig) -> dict[str, str]:
        found = memory(shape, config, gpu_bytes=GPU_GIB << 30)
        needed = {stage: f"{sum(terms.values()):.1f}" for stage, terms in found.items()}
        return needed | {"weights": f"{found['distill']['weights']:.1f}"}

    for name in SHAPES:
        shape = shape_of(name)
        lines.append(row(name, "the command's", computed(shape, EIGHT_B)))
        for tokens in (8192, 12288, 16384, 32768):
            lines.append(row(name, str(tokens), computed(shape, with_length(EIGHT_B, tokens))))
        longest = longest_documents(shape, EIGHT_B, gpu_gib=GPU_GIB)
        lines.append(row(name, f"longest in {GPU_GIB} GB", {stage: f"{n} tokens" for stage, n in longest.items()}))
    lines += [
        "",
        f"Window {EIGHT_B.window_tokens}, adapter of rank {EIGHT_B.distill.lora_rank}, {EIGHT_B.distill.batch_size} "
        f"document a step, {EIGHT_B.indexer.capture_gib:g} GiB of captures, weights in bfloat16. {RESERVED_GIB:g} GiB "
        "of the GPU is left to CUDA and the allocator.",
    ]
    return "\n".join(lines)


def spread(layers: int, query_heads: int, kv_heads: int, granularity: str, ratio: float = 0.15) -> HeadMap:
    """A share of the units as retrieval heads, as evenly over the layers as it goes."""
    size = query_heads // kv_heads if granularity == "group" else 1
    per_layer = query_heads // size
    count = round(ratio * layers * per_layer)
    chosen = {int((i + 0.5) * layers * per_layer / count) for i in range(count)}
    rows = [[u for u in range(per_layer) if layer * per_layer + u in chosen] for layer in range(layers)]
    retrieval = tuple(tuple(h for u in row for h in range(u * size, (u + 1) * size)) for row in rows)
    return HeadMap(query_heads=query_heads, kv_heads=kv_heads, granularity=granularity, retrieval=retrieval)


SERVED: dict[str, tuple[int, int, int, int, int]] = {
    "Llama-3.1-8B": (32, 32, 8, 128, 8192),
    "Qwen3-8B": (36, 32, 8, 128, 5120),
    "Qwen3-30B-A3B": (48, 32, 4, 128, 5120),
}
"""Layers, query heads, KV heads, head dimension and window of the models in `serving_memory`."""


def serving_memory() -> str:
    """KV cache in vLLM: computed, nothing was run."""
    shipped = Artifact.load(ROOT / "artefacts" / "smollm2-135m-8k")
    rows = [("SmolLM2-135M, the shipped artefact", shipped.heads, shipped.config, shipped.base_model["head_dim"])]
    for name, (layers, query_heads, kv_heads, head_dim, window) in SERVED.items():
        for granularity in ("group", "head"):
            heads = spread(layers, query_heads, kv_heads, granularity)
            rows.append((name, heads, SparseConfig(window_tokens=window), head_dim))
    lines = [
        "| model | mode | bytes per token, dense | sparse | windows, once a sequence | 32768 tokens, dense | sparse "
        "| 131072 tokens, dense | sparse |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, heads, config, head_dim in rows:
        found = memory_rows(heads, config, head_dim=head_dim, element_bytes=2, indexed=True)
        cells = [name, {"group": "whole groups", "head": "single heads"}[heads.granularity]]
        cells += [str(found["bytes_per_token"][kind]) for kind in ("dense", "sparse")]
        cells.append(f"{found['local_bytes'] / 1e9:.2f} GB")
        cells += [f"{found['sequences'][n][kind] / 1e9:.2f} GB" for n in (32768, 131072) for kind in ("dense", "sparse")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


COLOURS = {"heads": "#3b8ed0", "groups": "#e0702a", "paper": "#2ca58d"}


def speed_svg(found: dict[str, Any] | None = None) -> str:
    """Speedup over the best dense kernel against length, decode beside prefill: `found`, by default that of the results."""
    found = json.loads(LAYER.read_text()) if found is None else found
    names = {"heads": f"{len(found['shape']['retrieval'])} heads", "groups": "15 % of groups", "paper": "paper"}
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 380" font-family="sans-serif" font-size="13" fill="none">',
        "<title>Speedup of one sparse attention layer over the best dense kernel</title>",
    ]

    def text(x: float, y: float, content: str, anchor: str = "start", colour: str = INK, size: int = 13) -> None:
        place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" font-size="{size}"'
        parts.append(f"<text {place}>{content}</text>")

    for left, phase, rows in ((40, "Decode", found["rows"]), (490, "Prefill", found["prefill_rows"])):
        shown = [row for row in rows if "speedup" in row]
        lengths = sorted({row["slots"] for row in shown})
        batches = sorted({row["batch"] for row in shown})
        top = max(row["speedup"] for row in shown)
        step = next(s for s in (0.5, 1, 2, 5, 10, 20, 50, 100) if top / s <= 6)
        high = step * math.ceil(top / step)
        span = math.log2(lengths[-1] / lengths[0]) or 1.0

        def place(slots: int, speedup: float, left=left, first=lengths[0], span=span, high=high) -> tuple[float, float]:
            return left + 10 + 250 * math.log2(slots / first) / span, 330 - 280 * speedup / high

        text(left, 24, f"{phase}: times faster than the best dense kernel", size=14)
        for i in range(round(high / step) + 1):
            y = place(lengths[0], i * step)[1]
            parts.append(f'<path d="M{left} {y:.1f}h270" stroke="{INK}" stroke-opacity="0.3"/>')
            text(left - 6, y + 4, f"{i * step:g}", "end")
        for slots in (n for n in lengths if math.log2(n).is_integer()):  # others lie too close
            text(place(slots, 0)[0], 350, f"{slots // 1024}K", "middle")
        text(left + 135, 370, "tokens", "middle")
        labels = []
        for mode, batch in dict.fromkeys((row["mode"], row["batch"]) for row in shown):
            points = [place(row["slots"], row["speedup"]) for row in shown if (row["mode"], row["batch"]) == (mode, batch)]
            line = "L".join(f"{x:.1f} {y:.1f}" for x, y in sorted(points))
            dash = ' stroke-dasharray="6 4"' if batch != batches[0] else ""
            parts.append(f'<path d="M{line}" stroke="{COLOURS[mode]}" stroke-width="2"{dash}/>')
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{COLOURS[mode]}"/>' for x, y in points]
            labels.append([max(points)[1], names[mode] + (f", batch {batch}" if phase == "Decode" else ""), COLOURS[mode]])
        below = 400.0
        for y, label, colour in sorted(labels, reverse=True):  # labels that would overlap are pushed up
            below = min(y, below - 16)
            text(left + 272, below + 4, label, colour=colour)
    return "\n".join([*parts, "</svg>", ""])


TABLES = {
    "smollm2": smollm2, "speedups": speedups, "variants": partial(speedups, variants=True), "end_to_end": end_to_end,
    "layer": layer, "reads": reads, "dense_ends": dense_ends, "memory": memory_table, "serving_memory": serving_memory,
}  # fmt: skip
TABLES |= study_tables.TABLES
PAGES = (
    ROOT / "README.md",
    ROOT / "docs" / "speed.md",
    ROOT / "docs" / "memory.md",
    ROOT / "docs" / "serving.md",
    study_tables.PAGE,
)


def updated(text: str) -> str:
    """`text` with every table between its markers made anew."""
    for name, make in TABLES.items():
        mark = rf"(<!-- table:{name} -->\n).*?(<!-- end -->)"
        text = re.sub(mark, lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", text, flags=re.DOTALL)  # type: ignore[misc]
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(updated(page.read_text()))
    PLOT.write_text(speed_svg())
    study_tables.write_plot()
