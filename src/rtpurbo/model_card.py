"""What was measured of an artefact: read, checked, and as a table; model_card(artifact) -> its README on the hub."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .models import EMBEDDED, public_name

if TYPE_CHECKING:
    from .checkpoint import Artifact

STAGES = {"calibrate": "Calibration", "train_indexer": "Index training", "distill": "Distillation", "eval": "Evaluation"}
HEADER = ("Measure", "Dense", "Sparse", "Difference [95 %]", "Samples")
CAPTION = (
    "Dense and sparse answered the same samples. Difference is sparse minus dense with its 95 % interval; one whose "
    "interval holds 0 may be chance."
)
_EMBEDDED_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
_NONE = "–"


def caption(evaluation: dict[str, Any]) -> str:
    """What stands below the table of an evaluation."""
    end = evaluation.get("settings", {}).get("dense_end_tokens")
    return CAPTION if end is None else f"{CAPTION} The sparse model read the last {end:,} tokens of a prompt densely."


def _numbers(names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), float)


_PAIR = {**_numbers("samples dense sparse difference"), "difference_95": (float, float)}
_WEIGHTS_PAIR = {**_numbers("samples dense weights difference"), "difference_95": (float, float)}
_CLOSE = _numbers("kl top1_agreement")
_BY_NAME = {"sparse": _PAIR, "weights?": _WEIGHTS_PAIR}
_INDEX = {
    **_numbers("kl mass_kept tokens_selected length_tokens documents"),
    "units": [_numbers("layer unit kl mass_kept tokens_selected")],
}
_SPEED = _numbers("length_tokens prefill_seconds decode_tokens_per_second cache_bytes")
_STAGES = {
    "calibrate?": {
        "settings": {},
        "sources?": [str],
        "metrics": {
            "scores": [[float]],
            "check?": _numbers("length_tokens samples dense chosen_heads"),
            "overlap_between_seeds?": float,
            "overlap_between_halves?": float,
            "notes?": [str],
        },
    },
    "train_indexer?": {"settings": {}, "sources?": [str], "metrics": _INDEX},
    "distill?": {"settings": {}, "sources?": [str], "metrics": {}},
}
_LOSS = {
    **_PAIR,
    **_numbers("length_tokens kl top1_agreement"),
    "by_position": [_numbers("from to loss_dense loss_sparse")],
}
_SHORT = {
    "documents?": {
        "*": {"length_tokens": float, "sparse": {**_PAIR, **_CLOSE}, "weights?": {**_WEIGHTS_PAIR, **_CLOSE}},
    },
    "squad?": {"samples": float, "contains": _BY_NAME, "f1": _BY_NAME},
}
_LONG_GENERATION = {
    **_numbers("prompts prompt_tokens tokens"),
    "dense": _numbers("repetition loss"),
    "sparse": _numbers("repetition loss"),
    "loss": _PAIR,
    "drift": [_numbers("from to kl top1_agreement")],
}
_EVALUATION = {
    "needle?": [{**_PAIR, "kind": str, "length_tokens": float, "depths": {"*": _numbers("samples dense sparse")}}],
    "loss?": {"*": _LOSS},
    "short?": _SHORT,
    "long_generation?": _LONG_GENERATION,
    "index?": _INDEX,
    "speed?": {"dense": [_SPEED], "sparse": [_SPEED]},
    "tasks?": {"results": [{**_PAIR, "task": str, "metric": str, "higher_is_better": bool, "prompts_cut?": float}]},
    "settings?": {},
    "sources?": [str],
}
_CURVE = {**_numbers("step loss learning_rate"), "top1_agreement?": float}


def check(value: Any, shape: Any, where: str, advice: str) -> None:
    """ValueError when parsed JSON does not fit `shape`: float, bool, str, [item], (item, ...) or {key: item}.

    A key "x?" may be missing, "*" stands for all keys; keys beyond those of the shape are allowed.
    """
    good: bool
    if shape is float:
        real = isinstance(value, int | float) and not isinstance(value, bool)
        expected, good = "a finite number", real and math.isfinite(value)
    elif shape is bool:
        expected, good = "true or false", isinstance(value, bool)
    elif shape is str:
        expected, good = "text", isinstance(value, str)
    elif isinstance(shape, dict):
        expected, good = "an object", isinstance(value, dict)
    elif isinstance(shape, tuple):
        expected, good = f"a list of {len(shape)}", isinstance(value, list) and len(value) == len(shape)
    else:
        expected, good = "a list", isinstance(value, list)
    if not good:
        raise ValueError(f"{where}: expected {expected}, got {str(value)[:40]!r}. {advice}")
    if isinstance(shape, list | tuple):
        for number, item in enumerate(value):
            check(item, shape[0], f"{where}, entry {number}", advice)
    elif isinstance(shape, dict):
        for key, inner in shape.items():
            name = key.removesuffix("?")
            if name == key != "*" and name not in value:
                raise ValueError(f"{where}: expected the key {name!r}, got {', '.join(value) or 'no key'}. {advice}")
            for each in value if key == "*" else {name} & value.keys():
                check(value[each], inner, f"{where}, {each!r}", advice)


def overlap_sentence(metrics: dict[str, Any]) -> str:
    """What calibration's metrics say about its choice under another seed, "" when they say nothing."""
    for key, how in (
        ("overlap_between_seeds", "Chosen under two seeds, each with half of the documents"),
        ("overlap_between_halves", "Chosen from either half of the documents alone"),  # artefacts of 0.1.0
    ):
        if key in metrics:
            return f"{how}, {metrics[key]:.0%} of the retrieval heads are the same."
    return ""


def check_artifact(artifact: Artifact, where: str) -> None:
    """ValueError when what the stages recorded is malformed, or the scores do not fit the head map."""
    check(artifact.base_model, {"name": str, "head_dim?": float}, f"{where}, base model", "Convert again.")
    check(artifact.stages, _STAGES, f"{where}, stages", "Convert again.")
    heads = artifact.heads
    sizes = [len(row) for row in artifact.stages.get("calibrate", {}).get("metrics", {}).get("scores", [])]
    if "calibrate" in artifact.stages and sizes != [heads.query_heads] * len(heads.retrieval):
        raise ValueError(
            f"{where}, 'scores': expected {len(heads.retrieval)} layers of {heads.query_heads} heads, "
            f"got {len(sizes)} layers of {', '.join(map(str, sorted(set(sizes)))) or 'no'} heads. Calibrate again."
        )


def check_evaluation(raw: Any, where: str) -> dict[str, Any]:
    """The result of `evaluate`, "speed" as lists with one entry per length; ValueError when it is malformed."""
    if isinstance(raw, dict) and isinstance(raw.get("speed"), dict):
        speed = {name: [found] if isinstance(found, dict) else found for name, found in raw["speed"].items()}
        raw = {**raw, "speed": speed}
    check(raw, _EVALUATION, where, "Run `rtpurbo eval` again.")
    return raw


def read_evaluation(folder: Path) -> dict[str, Any]:
    """The checked `eval.json` of an artefact, empty when there is none."""
    file = folder / "eval.json"
    if not file.is_file():
        return {}
    return check_evaluation(_parse(file.read_bytes(), str(file), "Run `rtpurbo eval` again."), str(file))


def read_curve(folder: Path, stage: str) -> list[dict[str, float]]:
    """The checked rows of `metrics/<stage>.jsonl`, none when there is no such file."""
    file, advice = folder / "metrics" / f"{stage}.jsonl", "Delete the file to leave its curves out, or run the stage again."
    lines = file.read_bytes().splitlines() if file.is_file() else []
    rows = [_parse(line, f"{file}, line {number}", advice) for number, line in enumerate(lines, 1)]
    check(rows, [_CURVE], str(file), advice)
    return rows


def _parse(content: bytes, where: str, advice: str) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise ValueError(f"{where} is damaged: expected JSON, got {content[:40]!r} ({error}). {advice}") from error


class Row(NamedTuple):
    """One line of the measured table, as text under `HEADER`."""

    measure: str
    dense: str
    sparse: str
    difference: str
    samples: str


def measured_rows(artifact: Artifact, evaluation: dict[str, Any]) -> list[Row]:
    """Everything measured, from a checked artefact and evaluation; no line for what was not."""
    rows = []
    metrics = {name: stage["metrics"] for name, stage in artifact.stages.items()}
    needles = evaluation.get("needle", [])
    kinds = list(dict.fromkeys(one["kind"] for one in needles))
    for one in sorted(needles, key=lambda one: (kinds.index(one["kind"]), one["length_tokens"])):
        name = f"Answers right, {one['kind'].replace('_', '-')} needle, {tokens(one['length_tokens'])}"
        rows.append(Row(name, f"{one['dense']:.1%}", f"{one['sparse']:.1%}", _points(one), f"{one['samples']:,}"))
    for source, one in evaluation.get("loss", {}).items():
        what, count = f"{_public(source)}, {tokens(one['length_tokens'])}", f"{one['samples']:,}"
        rows.append(Row(f"Loss in nats, {what}", f"{one['dense']:.4f}", f"{one['sparse']:.4f}", change(one), count))
        rows.append(Row(f"KL to dense in nats, {what}", _NONE, f"{one['kl']:.4f}", _NONE, count))
        rows.append(Row(f"Same most likely token as dense, {what}", _NONE, f"{one['top1_agreement']:.1%}", _NONE, count))
    for short in short_rows(evaluation):
        pair = short.pairs["sparse"]
        means = [short.value(pair[name]) for name in ("dense", "sparse")]
        rows.append(Row(short.measure, means[0], means[1], short.difference(pair), short.samples))
    long = evaluation.get("long_generation")
    if long:
        what, count = f"{tokens(long['tokens'])} generated after {tokens(long['prompt_tokens'])}", f"{long['prompts']:,}"
        loss, (first, second) = long["loss"], [_share(long[name]["repetition"]) for name in ("dense", "sparse")]
        name = f"Dense model's loss in nats on {what}"
        rows.append(Row(name, _nats(loss["dense"]), _nats(loss["sparse"]), change(loss), count))
        rows.append(Row(f"Repeated pieces of 8 tokens among {what}", first, second, _NONE, count))
    for one in evaluation.get("tasks", {}).get("results", []):
        name = f"{one['task']}, {one['metric']}{'' if one['higher_is_better'] else ' (lower is better)'}"
        name += f", {one['prompts_cut']:,} prompts cut" if one.get("prompts_cut") else ""
        rows.append(Row(name, f"{one['dense']:.4f}", f"{one['sparse']:.4f}", change(one), f"{one['samples']:,}"))
    for dense, sparse in speed_pairs(evaluation):
        for name, key, text in (
            ("Cache", "cache_bytes", _bytes),
            ("Prefill", "prefill_seconds", "{:,.3f} s".format),
            ("Decode", "decode_tokens_per_second", "{:,.1f} tokens/s".format),
        ):
            what, ratio = tokens(dense["length_tokens"]), f"{sparse[key] / dense[key]:.2f} × dense" if dense[key] else _NONE
            rows.append(Row(f"{name}, {what}", text(dense[key]), text(sparse[key]), ratio, "1 run"))
    index = evaluation.get("index") or metrics.get("train_indexer")
    if index:
        what = f"index, {tokens(index['length_tokens'])}"
        count = f"{index['documents']:,} document{'s' * (index['documents'] != 1)}"
        rows.append(Row(f"Attention mass recalled, {what}", _NONE, f"{index['mass_kept']:.1%}", _NONE, count))
        share = f"{index['tokens_selected']:,.0f}, {index['far_selected_ratio']:.1%}"
        rows.append(Row(f"Far tokens selected per query, {what}", _NONE, share, _NONE, count))
    found = metrics.get("calibrate", {}).get("check")
    if found:
        pair = {**found, "sparse": found["chosen_heads"], "difference": found["chosen_heads"] - found["dense"]}
        name = f"Answers right, check of the head map without index, {tokens(found['length_tokens'])}"
        rows.append(Row(name, f"{pair['dense']:.1%}", f"{pair['sparse']:.1%}", _points(pair), f"{pair['samples']:,}"))
    return rows


class ShortRow(NamedTuple):
    """What was measured at short context, of the sparse model and perhaps of the distilled weights with dense attention."""

    measure: str
    value: Callable[[float], str]
    difference: Callable[[dict[str, Any]], str]
    pairs: dict[str, Any]
    samples: str


def short_rows(evaluation: dict[str, Any]) -> list[ShortRow]:
    """Loss of every source, then SQuAD's metrics, with how to write them down."""
    short, rows = evaluation.get("short", {}), []
    for source, one in short.get("documents", {}).items():
        name = f"Loss in nats at short context, {_public(source)}, {tokens(one['length_tokens'])}"
        rows.append(ShortRow(name, _nats, change, one, f"{one['sparse']['samples']:,}"))
    squad = short.get("squad", {})
    for key, name in (("contains", "SQuAD, replies with the answer"), ("f1", "SQuAD, F1 of the words")):
        if squad:
            rows.append(ShortRow(name, _share, _points, squad[key], f"{squad['samples']:,}"))
    return rows


def speed_pairs(evaluation: dict[str, Any]) -> list[tuple[dict[str, float], dict[str, float]]]:
    """(dense, sparse) at every length that both were measured at, ascending."""
    speed = evaluation.get("speed") or {"dense": [], "sparse": []}
    dense, sparse = ({row["length_tokens"]: row for row in speed[name]} for name in ("dense", "sparse"))
    return [(dense[n], sparse[n]) for n in sorted(dense.keys() & sparse.keys())]


def computed_cache(artifact: Artifact, dense: dict[str, float], lengths: list[float]) -> dict[str, list[float]]:
    """Bytes of a "dense" and a "sparse" cache at `lengths` by formula; empty where the measured dense cache differs from it.

    Args:
        dense: a dense model's measured "cache_bytes" and its "length_tokens".
    """
    heads, sparse, dim = artifact.heads, artifact.config, artifact.base_model.get("head_dim", 0)
    every = len(heads.retrieval) * heads.kv_heads
    width = dense["cache_bytes"] / (2 * every * dim * dense["length_tokens"]) if dim else 0  # bytes of a number
    if width not in (2, 4) or None in heads.retrieval:
        return {}
    full = sum(len(heads.full_kv_heads(i)) for i in heads.layers)
    units = sum(len(heads.units(i)) for i in heads.layers) * (artifact.indexer is not None)
    held = [window - 1 + sparse.sink_tokens for window in heads.held_windows(sparse.window_tokens)]
    local = [sum(min(n, most) for most in held) for n in lengths]
    index = units * sparse.index_bytes(round(width))
    found = [width * 2 * dim * (full * n + near) + index * n for n, near in zip(lengths, local, strict=True)]
    return {"dense": [width * 2 * dim * every * n for n in lengths], "sparse": found}


def all_settings(artifact: Artifact, evaluation: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings by the title of what they belong to."""
    tables = {"Base model": artifact.base_model, "Sparse attention": vars(artifact.config)}
    for name, stage in artifact.stages.items():
        sources = {"sources": stage["sources"]} if "sources" in stage else {}
        tables[STAGES.get(name, name)] = {**stage["settings"], **sources}
    if "settings" in evaluation:
        tables["Evaluation"] = {**evaluation["settings"], "sources": evaluation.get("sources", [])}
    return tables


def gaps(artifact: Artifact, evaluation: dict[str, Any]) -> list[str]:
    """What is missing or out of date, with the command that adds it."""
    missing = [name for name in STAGES if not (evaluation if name == "eval" else name in artifact.stages)]
    found = [f"{STAGES[name]} has not been run: `rtpurbo {name.replace('_', '-')}` adds it." for name in missing]
    if "artifact" in evaluation and evaluation["artifact"] != artifact.digest():
        found.append("The evaluation is of an earlier state of this artefact: `rtpurbo eval` measures it as it is now.")
    return found


def tokens(count: float) -> str:
    """2048 -> "2,048 tokens"."""
    return f"{count:,.0f} tokens"


def _bytes(count: float) -> str:
    return f"{count / 2**20:,.1f} MiB" if count < 2**30 else f"{count / 2**30:,.2f} GiB"


def _nats(value: float) -> str:
    return f"{value:.4f}"


def _share(value: float) -> str:
    return f"{value:.1%}"


def _signed(value: float, digits: int) -> str:
    return f"{value:+z.{digits}f}".replace("-", "−")


def change(pair: dict[str, Any]) -> str:
    """Difference of a paired result with its interval, four digits."""
    return _signed(pair["difference"], 4) + _interval(pair, 1, 4)


def _interval(pair: dict[str, Any], scale: float, digits: int) -> str:
    if pair["samples"] < 2 or "difference_95" not in pair:  # one sample says nothing about its spread
        return ""
    return " [{}, {}]".format(*(_signed(scale * x, digits) for x in pair["difference_95"]))


def _points(pair: dict[str, Any]) -> str:
    return f"{_signed(100 * pair['difference'], 1)} points{_interval(pair, 100, 1)}"


def _public(value: Any) -> Any:
    """A path without the directories of the machine it lies on; what is no path stays as it is."""
    if isinstance(value, list | tuple):
        return ", ".join(str(_public(item)) for item in value) or "none"
    return public_name(value) if isinstance(value, str) else value


def _plain(text: object) -> str:
    """Text that Markdown and HTML leave as it is."""
    return re.sub(r"([\\`*_{}\[\]<>()#!|&~$])", r"\\\1", " ".join(str(text).split()))


def model_card(artifact: Artifact, evaluation: dict[str, Any] | None = None) -> str:
    """The README of an artefact's hub repository.

    Args:
        evaluation: what `rtpurbo.evaluate` returned; without it the table has what the stages measured.

    Raises:
        ValueError: malformed metrics or evaluation.
    """
    check_artifact(artifact, "the artefact")
    evaluation = check_evaluation(evaluation or {}, "the evaluation")
    name = str(artifact.base_model["name"])
    local, shown = os.path.isabs(name), _public(name)
    front: dict[str, Any] = {} if local else {"base_model": _EMBEDDED_ON_HUB if name == EMBEDDED else name}
    front |= {
        "library_name": "rtpurbo",
        "pipeline_tag": "text-generation",
        "tags": ["rtpurbo", "sparse-attention", "long-context", "kv-cache"],
    }
    yaml = "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in front.items())
    heads = artifact.heads
    index = f"selects far tokens with {artifact.config.rule}" if artifact.indexer is not None else "none yet"
    weights = {"lora": "a LoRA adapter", "full": "a whole model"}.get(artifact.weights_kind or "", "none yet")
    window = f"{'' if heads.windows is None else 'at most '}{artifact.config.window_tokens:,}"
    rows = measured_rows(artifact, evaluation)
    lines = [HEADER, ("---",) * len(HEADER), *(map(_plain, row) for row in rows)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + f"\n\n{caption(evaluation)}"
    measured = "\n\n".join([table if rows else "Nothing has been measured yet.", *gaps(artifact, evaluation)])
    settings = "\n".join(
        f"- **{_plain(title)}**: {'; '.join(f'{_plain(k)} = {_plain(_public(v))}' for k, v in values.items())}"
        for title, values in all_settings(artifact, evaluation).items()
    )
    where = ', base_model="path/to/it"' if local and artifact.weights_kind != "full" else ""
    return f"""---
{yaml}---

# {_plain(shown)}, sparse with RTPurbo

A sparse-attention version of {_plain(shown)}, made with [RTPurbo](https://arxiv.org/abs/2605.16928): a few retrieval heads
read far tokens, all other heads see a window of {window} tokens and {artifact.config.sink_tokens}
sinks. This repository holds what is added to the base model:

- head map: {heads.ratio:.1%} of the query heads retrieve, {heads.full_kv_ratio:.1%} of the KV heads keep their whole cache
- index: {index}
- distilled weights: {weights}

## Use

```python
import rtpurbo
model, tokenizer = rtpurbo.load("OWNER/NAME"{where})  # this repository
print(tokenizer.decode(model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=50)[0]))
```

```sh
rtpurbo generate OWNER/NAME --prompt "Once upon a time"
```

## Measured

{measured}

## Settings

{settings}

## Citation

Y. Zhou et al., "Full Attention Strikes Back: Transferring Full Attention into Sparse within Hundred Training Steps",
[arXiv:2605.16928](https://arxiv.org/abs/2605.16928).

## License

The license of the base model applies to these files too: the head map, the index and the distilled weights are derived from
its weights.
"""
