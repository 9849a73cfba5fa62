"""Whole models on one GPU, dense and sparse: time to first token, time per output token, memory.

    python benchmarks/end_to_end.py --artifact OUT --model BASE --lengths 32768 --json real.json
    python benchmarks/end_to_end.py --lengths 32768 131072 262144 --json qwen3_8b_shape.json

With an artefact: the converted model on real text, with its own selections. Without one: a model of Qwen3-8B's shape with
random weights. Its head map is that of SmolLM2-135M, stretched over its layers (`stretched`). Random weights would select
nearly everything, so its selections are replayed: index queries and keys are projected as always and then overwritten
(`ReplayIndexer`), so that a given share of the far tokens is selected, one share in prefill and another in decode.

Nothing is timed before the shares really selected are measured and, where replayed, found to be those asked for, and before
a prompt that fits in the window gives the dense model's next token. (Where memory does not suffice to measure shares, the
row says so instead.)

The same weights run dense: by Transformers' own SDPA and, where the package is installed, by its `flash_attention_4`. A
prompt is read in one piece unless `--chunk-tokens` cuts it (SDPA then needs a mask and loses its fastest kernel). Every MLP
works on `--mlp-tokens` tokens at once, dense and sparse alike: its activations of a long prompt would fill the GPU. Times:

- ttft_seconds: wall time from token ids to the last token's logits, the shortest of `--repeats`, all after a warm-up.
- tpot_seconds: median wall time of a decode step as Transformers runs it, launch by launch.
- tpot_gpu_seconds: time of a step in which the GPU was busy, by the profiler. Of this, tpot_gpu_cat_seconds are torch.cat:
  nearly all of it is Transformers' cache, which a dense model copies whole at each step.

Shapes: B batch, T tokens, N slots, P positions of a tile, Hq query heads, Hkv KV heads, D head dimension, U index units of a
layer, d index dimension.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from environment import environment
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, DynamicCache, Qwen3Config
from transformers.utils import is_flash_attn_4_available

import rtpurbo
from rtpurbo import ops
from rtpurbo.attach import attach, paused, recording
from rtpurbo.attention import LayerState, Observed
from rtpurbo.cache import CACHE, cache_bytes
from rtpurbo.config import SparseConfig
from rtpurbo.data import documents
from rtpurbo.evals.layer_speed import BELOW_NATS, SPREAD_NATS, layer_shape
from rtpurbo.families import attention_layers, context_tokens, head_counts
from rtpurbo.heads import HeadMap
from rtpurbo.indexer import LayerIndexer
from rtpurbo.models import public_name, resolve_device, resolve_dtype

SPARSE, SDPA, FLASH = "sparse", "sdpa", "flash_attention_4"
MEASURED_MAP = Path(__file__).parent.parent / "artefacts" / "smollm2-135m-8k" / "rtpurbo_config.json"
SETTLING_STEPS = 2
"""Decode steps before the timed ones: in the first, every full buffer of the sparse cache grows and is copied."""
PROFILED_STEPS = 4
TILES = 8
"""Tiles of positions whose selections are measured, evenly over the second half of the last piece of the prompt."""
TILE_TOKENS = 128
"""Prompts are whole multiples of this, so that no tile of any kernel is cut."""
SHORT_TOKENS = 512
"""Longest prompt of the comparison with the dense model."""


class ReplayIndexer(LayerIndexer):
    """A LayerIndexer that pays for its projections and then answers what was recorded.

    Args:
        keys: [U or more, N, d], what `replayed_keys` made.
    """

    keys: Tensor
    queries: Tensor

    def __init__(self, heads: HeadMap, layer: int, *, head_dim: int, keys: Tensor):
        dim = keys.shape[-1]
        super().__init__(heads, layer, head_dim=head_dim, index_dim=dim)
        self.register_buffer("keys", keys[: len(heads.units(layer))], persistent=False)
        halves = torch.arange(dim, device=keys.device) < dim // 2
        self.register_buffer("queries", torch.stack([halves, ~halves]).float(), persistent=False)
        self.seen_tokens = 0

    def project_queries(self, q_pre: Tensor) -> Tensor:
        """[B, U, T, d]: ones where the keys hold the scores of prefill, or with T = 1 those of decode."""
        return super().project_queries(q_pre).copy_(self.queries[int(q_pre.shape[2] == 1)])

    def project_keys(self, k_pre: Tensor) -> Tensor:
        """[B, U, T, d]: the keys of the next T positions; `restart` goes back to the first."""
        first, self.seen_tokens = self.seen_tokens, self.seen_tokens + k_pre.shape[2]
        return super().project_keys(k_pre).copy_(self.keys[:, first : self.seen_tokens])


def replayed_keys(
    units: int, tokens: int, *, index_dim: int, prefill_far: float, decode_far: float, sinks: int, device: str, seed: int = 0
) -> Tensor:
    """Index keys [U, N, d] by which every query selects these shares of all tokens: score 0, the others 12 to 17 nats less.

    Sinks always score 0, so that no query sees only low scores, the best of which it would select.
    """
    if index_dim < 2 or index_dim % 2:
        raise ValueError(f"index_dim must be even, for the scores of prefill and of decode, got {index_dim}.")
    generator = torch.Generator(device=device).manual_seed(seed)
    parts = []
    for far in (prefill_far, decode_far):
        chosen = torch.rand(units, tokens, generator=generator, device=device) < far
        chosen[:, :sinks] = True
        below = BELOW_NATS + SPREAD_NATS * torch.rand(units, tokens, generator=generator, device=device)
        score = torch.where(chosen, 0.0, -below) / (index_dim // 2)
        parts.append(score.to(torch.bfloat16)[..., None].expand(-1, -1, index_dim // 2))
    return torch.cat(parts, -1)


def stretched(source: HeadMap, *, layers: int, query_heads: int, kv_heads: int, granularity: str, ratio: float) -> HeadMap:
    """A map of another shape whose retrieval units lie as deep as those of `source`.

    The depths of the source's units, each spread over its part of its layer, are read at evenly spaced quantiles. A layer's
    units are spread evenly over its heads.

    Raises:
        ValueError: more units than some layer has.
    """
    depths = []  # (where a source unit begins, its length), in whole models
    for layer, _ in enumerate(source.retrieval):
        here = len(source.units(layer))
        depths += [((layer + i / here) / len(source.retrieval), 1 / here / len(source.retrieval)) for i in range(here)]
    most = kv_heads if granularity == "group" else query_heads
    wanted = max(1, round(ratio * layers * most))
    counts: Counter[int] = Counter()
    for i in range(wanted):
        unit, inside = divmod((i + 0.5) / wanted * len(depths), 1)
        begin, length = depths[int(unit)]
        counts[int((begin + inside * length) * layers)] += 1
    if max(counts.values()) > most:
        raise ValueError(f"ratio must leave every layer at most its {most} {granularity}s, got {ratio}; ask for less.")
    size = query_heads // kv_heads if granularity == "group" else 1
    retrieval = tuple(
        tuple(i * most // counts[layer] * size + j for i in range(counts[layer]) for j in range(size))
        for layer in range(layers)
    )
    return HeadMap(query_heads=query_heads, kv_heads=kv_heads, granularity=granularity, retrieval=retrieval)  # type: ignore[arg-type]


def random_model(args: argparse.Namespace, device: str) -> Any:
    """A sparse Qwen3 of the shape asked for with random weights, selections replayed."""
    shape = layer_shape(args.shape, retrieval=(), window_tokens=args.window, far_ratio=args.decode_far)
    tokens = max(args.lengths) + SETTLING_STEPS + args.steps + PROFILED_STEPS
    dense = Qwen3Config(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.mlp,
        num_hidden_layers=args.layers,
        num_attention_heads=shape.query_heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=tokens,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(device):
        dtype = resolve_dtype(args.dtype, device)
        model = AutoModelForCausalLM.from_config(dense, dtype=dtype, attn_implementation="sdpa").eval()
    heads = stretched(
        HeadMap.from_dict(json.loads(MEASURED_MAP.read_text())["heads"]),
        layers=args.layers,
        query_heads=shape.query_heads,
        kv_heads=shape.kv_heads,
        granularity=args.granularity,
        ratio=args.ratio,
    )
    config = SparseConfig(window_tokens=args.window, index_dim=args.index_dim, dense_end_tokens=args.dense_end_tokens)
    keys = replayed_keys(
        max(len(heads.units(layer)) for layer in heads.layers),
        tokens,
        index_dim=args.index_dim,
        prefill_far=args.prefill_far,
        decode_far=args.decode_far,
        sinks=config.sink_tokens,
        device=device,
    )
    indexer = nn.ModuleDict(
        {
            str(layer): ReplayIndexer(heads, layer, head_dim=shape.head_dim, keys=keys)
            for layer in heads.layers
            if heads.retrieval_heads(layer)
        }
    )
    attach(model, heads, config, indexer)
    return model


def slice_mlps(model: Any, tokens: int) -> None:
    """Let every MLP work on at most so many tokens at once: the same values, less memory."""

    def sliced(forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        if hidden.shape[1] <= tokens:
            return forward(hidden)
        out = torch.empty_like(hidden)
        for piece, place in zip(hidden.split(tokens, 1), out.split(tokens, 1), strict=True):
            place.copy_(forward(piece))
        return out

    for layer in model.model.layers:
        layer.mlp.forward = partial(sliced, layer.mlp.forward)


@contextmanager
def running(model: Any, variant: str) -> Iterator[None]:
    """The attached model as it is ("sparse"), or dense by this attention of Transformers."""
    if variant == SPARSE:
        yield
        return
    with paused(model):
        model.config._attn_implementation = variant
        yield


def state_of(model: Any) -> LayerState:
    """Head map and settings of a sparse model, as its first sparse layer holds them."""
    return next(m.__dict__["rtpurbo"] for m in model.modules() if "rtpurbo" in m.__dict__)


def restart(model: Any) -> None:
    """Replayed index keys begin again at position 0."""
    for module in model.modules():
        if isinstance(module, ReplayIndexer):
            module.seen_tokens = 0


@torch.no_grad()
def prefill(model: Any, ids: Tensor, chunk_tokens: int) -> tuple[DynamicCache, Tensor]:
    """(cache, last token's logits [1, 1, vocabulary]) of a prompt [1, N], in pieces of `chunk_tokens` (0: one piece)."""
    restart(model)
    cache = DynamicCache(config=model.config)
    for piece in ids.split(chunk_tokens or ids.shape[1], 1):
        logits = model(piece, **{CACHE: cache}, logits_to_keep=1).logits
    return cache, logits


@torch.no_grad()
def decode(model: Any, cache: DynamicCache, logits: Tensor) -> Tensor:
    """Logits [1, 1, vocabulary] after the likeliest next token."""
    return model(logits[:, -1:].argmax(-1), **{CACHE: cache}, logits_to_keep=1).logits


def check_short(model: Any, ids: Tensor) -> dict[str, Any]:
    """Compare with the dense model on a prompt that fits in the window; ValueError unless both give one next token."""
    prompt = ids[:, : min(SHORT_TOKENS, state_of(model).config.window_tokens)]
    found = {}
    for variant in (SPARSE, SDPA):
        with running(model, variant):
            found[variant] = prefill(model, prompt, 0)[1].float()
    sparse, dense = found[SPARSE], found[SDPA]
    if not sparse.isfinite().all() or int(sparse.argmax()) != int(dense.argmax()):
        raise ValueError(
            f"Expected the dense model's next token {int(dense.argmax())} after {prompt.shape[1]} tokens that fit in the "
            f"window, got {int(sparse.argmax())}. Nothing was timed; check the installation with rtpurbo doctor."
        )
    return {"tokens": prompt.shape[1], "largest_logit_difference": float((sparse - dense).abs().max())}


def _selected(index_q: Tensor, index_k: Tensor, at: Tensor, config: SparseConfig) -> Tensor:
    """[U, T, N] bool: which of the keys [U, N, d] the queries [U, T, d] at positions `at` [T] select."""
    unseen = torch.arange(index_k.shape[1], device=at.device) > at[:, None]
    scores = ops.index_scores(index_q, index_k).masked_fill(unseen, -torch.inf)
    return scores >= ops.top_p_threshold(scores, config.top_p, config.min_probability)


@torch.no_grad()
def selected_shares(model: Any, ids: Tensor, *, chunk_tokens: int, tile_positions: int) -> dict[str, float]:
    """Shares of the far tokens that are selected, means over index units, after prefill and one decode step.

    Returns:
        "prefill_tile": by any of `tile_positions` positions side by side, what a tile of prefill reads; "prefill_position":
        by one of them; "decode". Empty for a model without an index.
    """
    modules = attention_layers(model)
    tokens, length = ids.shape[1], min(chunk_tokens or ids.shape[1], ids.shape[1])
    last = (tokens - 1) // length * length
    begins = torch.linspace((last + tokens) / 2, tokens - tile_positions, TILES).long() // tile_positions * tile_positions
    places = begins[:, None] + torch.arange(tile_positions)  # [TILES, P]
    queries: dict[int, Tensor] = {}

    def record(seen: Observed) -> None:
        indexer: Any = modules[seen.layer]._modules.get("rtpurbo_indexer")
        if indexer is None or seen.q_pre.shape[2] not in (1, tokens - last):
            return
        few = seen.q_pre[:, :, (places.flatten() - last).to(ids.device)] if seen.q_pre.shape[2] > 1 else seen.q_pre
        queries[seen.layer] = indexer.project_queries(few)[0].to(seen.k.dtype)

    with recording(model, record):
        cache, logits = prefill(model, ids, chunk_tokens)
        in_prefill = dict(queries)
        decode(model, cache, logits)
    shares: dict[str, list[Tensor]] = {"prefill_tile": [], "prefill_position": [], "decode": []}
    for layer, index_q in in_prefill.items():
        kept: Any = cache.layers[layer]
        index_k = kept.view(None).index_k[0]
        config = modules[layer].__dict__["rtpurbo"].config
        for at, q in zip(places.to(ids.device), index_q.split(tile_positions, 1), strict=True):
            far = slice(config.sink_tokens, int(at[0]) - config.window_tokens + 1)
            chosen = _selected(q, index_k, at, config)[..., far].float()
            shares["prefill_tile"].append(chosen.amax(1).mean(-1))
            shares["prefill_position"].append(chosen.mean((1, 2)))
        at = torch.tensor([tokens], device=ids.device)
        far = slice(config.sink_tokens, tokens - config.window_tokens + 1)
        shares["decode"].append(_selected(queries[layer], index_k, at, config)[:, 0, far].float().mean(-1))
    return {name: float(torch.cat(parts).mean()) for name, parts in shares.items() if parts}


def check_shares(got: dict[str, float], *, far_tokens: int, prefill_far: float, decode_far: float) -> None:
    """ValueError when the shares selected are not those asked for, to four standard deviations of a random choice."""
    for name, wanted in (("prefill_tile", prefill_far), ("decode", decode_far)):
        allowed = 4 * (wanted * (1 - wanted) / far_tokens) ** 0.5 + 1e-6
        if abs(got[name] - wanted) > allowed:
            raise ValueError(
                f"Expected {wanted:.4f} of the far tokens selected in {name} (to {allowed:.4f}), got {got[name]:.4f}. "
                "Nothing was timed: the replay does not fit this model."
            )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _start_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def gpu_seconds(step: Callable[[], object], device: torch.device) -> dict[str, float | None]:
    """Seconds of a call in which the GPU was busy, and those of torch.cat in it; None on a CPU."""
    names = ("tpot_gpu_seconds", "tpot_gpu_cat_seconds")
    if device.type != "cuda":
        return dict.fromkeys(names)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED_STEPS):
            step()
        torch.cuda.synchronize(device)
    kernels = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    busy, until = 0.0, 0.0
    for begin, end in sorted((event.time_range.start, event.time_range.end) for event in kernels):
        busy += max(0.0, end - max(begin, until))  # the union: launches may overlap
        until = max(until, end)
    cat = sum(event.time_range.elapsed_us() for event in kernels if "CatArray" in event.name)
    return dict(zip(names, (busy / 1e6 / PROFILED_STEPS, cat / 1e6 / PROFILED_STEPS), strict=True))


def measure(model: Any, ids: Tensor, *, chunk_tokens: int, steps: int, repeats: int) -> dict[str, Any]:
    """Times, peaks and cache bytes of the model as it is; a dict that is filled as far as memory allows."""
    device = ids.device
    row: dict[str, Any] = {"ttft_all_seconds": []}
    cache = logits = None
    try:
        for _ in range(repeats):
            cache = logits = None  # gives the memory of the last one back
            _start_peak(device)
            begin = _now(device)
            cache, logits = prefill(model, ids, chunk_tokens)
            row["ttft_all_seconds"].append(_now(device) - begin)
            row["ttft_seconds"] = min(row["ttft_all_seconds"])
            row["prefill_peak_bytes"] = _peak_bytes(device)
        assert cache is not None
        assert logits is not None
        if not logits.isfinite().all():
            raise ValueError(
                f"Expected finite logits after {ids.shape[1]} tokens, got others; the times would mean nothing."
            )
        row["cache_bytes"] = cache_bytes(cache)
        _start_peak(device)
        times = []
        for _ in range(SETTLING_STEPS + steps):
            begin = _now(device)
            logits = decode(model, cache, logits)
            times.append(_now(device) - begin)
        row["tpot_seconds"] = statistics.median(times[SETTLING_STEPS:])
        row["first_step_seconds"] = times[0]
        row["decode_peak_bytes"] = _peak_bytes(device)
        row["decode_cache_bytes"] = cache_bytes(cache)
        row |= gpu_seconds(partial(decode, model, cache, logits), device)
    except torch.OutOfMemoryError as problem:
        row["out_of_memory"] = str(problem).splitlines()[0]
    return row


def describe(model: Any) -> dict[str, Any]:
    """Shape of the model and what of it is sparse."""
    config = model.config.get_text_config(decoder=True)
    state = state_of(model)
    layers, query_heads, kv_heads, head_dim = head_counts(model)
    heads = state.heads
    return {
        "model": {
            "type": config.model_type,
            "parameters": sum(p.numel() for name, p in model.named_parameters() if "rtpurbo_indexer" not in name),
            "layers": layers,
            "hidden": config.hidden_size,
            "query_heads": query_heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "mlp": config.intermediate_size,
            "vocabulary": config.vocab_size,
            "dtype": str(model.dtype),
        },
        "sparse": dataclasses.asdict(state.config),
        "heads": {
            "granularity": heads.granularity,
            "retrieval_ratio": heads.ratio,
            "full_kv_ratio": heads.full_kv_ratio,
            "units_by_layer": [len(heads.units(layer)) for layer in range(layers)],
        },
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, help="a converted model; without it one with random weights")
    parser.add_argument("--model", help="where the artefact's base model lies, if not where the artefact says")
    parser.add_argument("--text", nargs="+", default=["installed-docs:heldout"], help="sources of the artefact's prompts")
    parser.add_argument("--shape", default="32/8/128", help="query heads/KV heads/head dimension")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--mlp", type=int, default=12288, help="hidden dimension of the MLPs")
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--window", type=int, default=8192, help="in tokens")
    parser.add_argument("--index-dim", type=int, default=16)
    parser.add_argument("--granularity", choices=("group", "head"), default="group")
    parser.add_argument("--ratio", type=float, default=0.15, help="share of KV groups, or of query heads, that retrieve")
    parser.add_argument("--prefill-far", type=float, default=0.07, help="share of far tokens that a tile of prefill reads")
    parser.add_argument("--decode-far", type=float, default=0.09, help="share of far tokens that a unit selects in decode")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072], help="prompts in tokens")
    parser.add_argument("--variants", nargs="+", choices=(SPARSE, SDPA, FLASH), default=[SPARSE, FLASH, SDPA])
    parser.add_argument("--dense-up-to", type=int, help="longest prompt of the dense variants, in tokens")
    parser.add_argument("--chunk-tokens", type=int, default=0, help="pieces of a prompt; 0 reads it at once")
    parser.add_argument("--dense-end-tokens", type=int, default=0, help="last ones of a prompt, for all heads")
    parser.add_argument("--mlp-tokens", type=int, default=16384, help="tokens that an MLP works on at once")
    parser.add_argument("--steps", type=int, default=16, help="timed decode steps")
    parser.add_argument("--repeats", type=int, default=2, help="timed prefills")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="result, written again after every row")
    args = parser.parse_args(argv)
    if args.chunk_tokens and args.dense_end_tokens:
        parser.error("--dense-end-tokens takes the prompt in one piece, without --chunk-tokens")
    return args


def prompt_lengths(lengths: list[int], context: int, new_tokens: int, config: SparseConfig) -> list[int]:
    """Lengths cut to what the context leaves room for and to whole tiles; ValueError when nothing lies far in one."""
    fitting = [min(length, context - new_tokens) // TILE_TOKENS * TILE_TOKENS for length in lengths]
    least = 2 * (config.window_tokens + config.sink_tokens + TILE_TOKENS)
    if min(fitting) < least:
        raise ValueError(
            f"lengths must be at least {least} tokens, twice the window, as selections are measured in the second half, and "
            f"fit in the context of {context} with {new_tokens} new ones, got {', '.join(map(str, lengths))}."
        )
    return list(dict.fromkeys(fitting))


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    for name in ("steps", "repeats", "mlp_tokens", "layers"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(args, name)}.")
    if args.chunk_tokens < 0 or args.chunk_tokens % TILE_TOKENS:
        raise ValueError(f"chunk_tokens must be 0 or a multiple of {TILE_TOKENS}, got {args.chunk_tokens}.")
    device = resolve_device(args.device)
    begin = time.time()
    tokenizer = None
    if args.artifact:
        end = args.dense_end_tokens
        model, tokenizer = rtpurbo.load(
            args.artifact, dtype=args.dtype, device=device, base_model=args.model, dense_end_tokens=end
        )
    else:
        model = random_model(args, device)
    slice_mlps(model, args.mlp_tokens)
    state = state_of(model)
    new_tokens = SETTLING_STEPS + args.steps + PROFILED_STEPS
    lengths = prompt_lengths(args.lengths, context_tokens(model), new_tokens, state.config)
    variants = list(dict.fromkeys(args.variants))
    named = {"artifact": args.artifact and args.artifact.name, "model": args.model and public_name(args.model)}
    result: dict[str, Any] = {
        "environment": environment(),
        **describe(model),
        "attention": "{} ({})".format(*ops.backend(model.device.type, model.dtype, head_counts(model)[3])),
        "settings": {name: value for name, value in vars(args).items() if name != "json"} | named,
        "skipped": {},
        "rows": [],
    }

    def say(text: str) -> None:
        """Print, and write what is known so far."""
        print(f"[{time.time() - begin:6.1f} s] {text}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")

    def prompt(length: int) -> Tensor:
        if tokenizer is not None:
            ids = documents(args.text, tokenizer, length_tokens=length, count=1, seed=0)[0]
        else:
            ids = torch.randint(model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
        return ids[None].to(model.device)

    prompts = {length: prompt(length) for length in lengths}
    say(f"model ready on {result['environment']['device']}, attention by {result['attention']}")
    result["gate"] = check_short(model, prompts[min(lengths)])
    if FLASH in variants and not is_flash_attn_4_available():
        variants.remove(FLASH)
        result["skipped"][FLASH] = "no package flash-attn-4, or no GPU"
    for variant in list(variants):
        try:
            with running(model, variant):
                measure(model, prompts[min(lengths)], chunk_tokens=args.chunk_tokens, steps=1, repeats=1)
        except (ImportError, AttributeError, TypeError, AssertionError, RuntimeError) as problem:
            if variant != FLASH:  # a prerelease that this Transformers may not know how to call
                raise
            variants.remove(FLASH)
            result["skipped"][FLASH] = f"{type(problem).__name__}: {problem}"
    say(f"warm, {result['gate']}, skipped: {result['skipped'] or 'nothing'}\n{HEADER}")
    for length, ids in prompts.items():
        for variant in variants:
            if variant != SPARSE and length > (args.dense_up_to or length):
                continue
            row: dict[str, Any] = {"length_tokens": length, "variant": variant}
            row |= {"chunk_tokens": args.chunk_tokens, "mlp_tokens": args.mlp_tokens}
            with running(model, variant):
                if variant == SPARSE:
                    row["selected_shares"] = checked_shares(model, ids, args)
                row |= measure(model, ids, chunk_tokens=args.chunk_tokens, steps=args.steps, repeats=args.repeats)
            if model.device.type == "cuda":
                torch.cuda.empty_cache()
            result["rows"].append(row)
            say(f"\n{line(row)}")
            if row.get("selected_shares"):
                print(f"          selected: {row['selected_shares']}", flush=True)
    say(f"\n{table(result['rows'])}")
    return result


def checked_shares(model: Any, ids: Tensor, args: argparse.Namespace) -> dict[str, float] | str:
    """`selected_shares` of a row, checked where they are replayed; or why memory does not suffice to measure them."""
    from rtpurbo.ops.reference import tile_positions

    state = state_of(model)
    tile = tile_positions(state.heads.heads_per_unit, head_counts(model)[3])
    try:
        got = selected_shares(model, ids, chunk_tokens=args.chunk_tokens, tile_positions=tile)
    except torch.OutOfMemoryError as problem:
        return str(problem).splitlines()[0]
    if not args.artifact:
        far_tokens = ids.shape[1] // 2 - state.config.window_tokens - state.config.sink_tokens
        check_shares(got, far_tokens=far_tokens, prefill_far=args.prefill_far, decode_far=args.decode_far)
    return got


COLUMNS = {
    "first token, s": ("ttft_seconds", 1, 3),
    "next, ms": ("tpot_seconds", 1e3, 1),
    "GPU busy, ms": ("tpot_gpu_seconds", 1e3, 1),
    "of it cat, ms": ("tpot_gpu_cat_seconds", 1e3, 1),
    "cache, GB": ("cache_bytes", 1e-9, 3),
    "prefill peak, GB": ("prefill_peak_bytes", 1e-9, 1),
    "decode peak, GB": ("decode_peak_bytes", 1e-9, 1),
}
"""Title of a column: key of a row, scale, decimals."""
HEADER = "  ".join([f"{'tokens':>8}", f"{'variant':<17}", *COLUMNS])


def line(row: dict[str, Any]) -> str:
    """A row under HEADER, and why it ended early."""
    cells = [f"{row['length_tokens']:>8}", f"{row['variant']:<17}"]
    for title, (key, scale, decimals) in COLUMNS.items():
        text = "-" if row.get(key) is None else f"{row[key] * scale:.{decimals}f}"
        cells.append(f"{text:>{len(title)}}")
    return "  ".join([*cells, row.get("out_of_memory", "")]).rstrip()


def table(rows: list[dict[str, Any]]) -> str:
    """All rows, and how many times faster than the best dense variant the sparse model is at each length."""
    lines = [HEADER, *map(line, rows)]
    for length in dict.fromkeys(row["length_tokens"] for row in rows):
        gains = []
        for title in ("first token, s", "next, ms", "GPU busy, ms"):
            key = COLUMNS[title][0]
            seconds = {row["variant"]: row[key] for row in rows if row["length_tokens"] == length and row.get(key)}
            sparse = seconds.pop(SPARSE, None)
            if sparse and seconds:
                gains.append(f"{title.split(',')[0]} {min(seconds.values()) / sparse:.2f}x")
        lines.append(f"{length:>8}  sparse against the best dense: {', '.join(gains) or 'not measured'}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
