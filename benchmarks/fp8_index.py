"""What an index selects with keys in fewer bits: python benchmarks/fp8_index.py MODEL ARTEFACT --dev ... -o FILE

Against the selection of float32 keys, on the full attention of the base model: one document of every source, a calibration
document of the first one beside it, from which scales, means and rotations are taken.

Shapes: U units of a layer, m queries, N tokens, d index dimension.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from environment import environment
from torch import Tensor

from rtpurbo.checkpoint import Artifact, check_fingerprint
from rtpurbo.data import documents
from rtpurbo.families import head_counts
from rtpurbo.indexer import indexer_from_state
from rtpurbo.indexer_training import _causal, capture, target_attention
from rtpurbo.models import load_model
from rtpurbo.ops import far_slots, index_scores, top_p_threshold

FLOAT8 = torch.float8_e4m3fn
LARGEST, SMALLEST_NORMAL = torch.finfo(FLOAT8).max, torch.finfo(FLOAT8).tiny


def float8(x: Tensor) -> Tensor:
    """Rounded to e4m3."""
    return x.clamp(-LARGEST, LARGEST).to(FLOAT8).float()


def hadamard_matrix(size: int) -> Tensor:
    """Orthogonal [size, size], all entries alike but for their sign; `size` a power of two."""
    made = torch.ones(1, 1)
    while made.shape[0] < size:
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)]) / 2**0.5
    return made


def spread(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """(for queries, for keys) [U, d, d]: scores stay, both get the same second moments, as large in every dimension."""
    moments = [(x.transpose(-1, -2) @ x / x.shape[1]).double() for x in (q, k)]
    root_q, root_k = (torch.linalg.cholesky(x + 1e-9 * torch.eye(x.shape[-1])) for x in moments)
    left, values, right = torch.linalg.svd(root_q.transpose(-1, -2) @ root_k)
    hadamard = hadamard_matrix(q.shape[-1]).double()
    size = values.sqrt()[..., None]
    for_q = hadamard @ (size * (left.transpose(-1, -2) @ torch.linalg.inv(root_q)))
    for_k = hadamard @ (size * (right @ torch.linalg.inv(root_k)))
    return for_q.float(), for_k.float()


def variants(q: Tensor, k: Tensor, q_seen: Tensor, k_seen: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """By name (queries [U, m, d], keys [U, N, d]) as they are scored; `q_seen` and `k_seen` of the calibration document."""
    scale = 2.0 ** (4 - k_seen.square().mean(1, keepdim=True).sqrt().log2().round())  # a root mean square of 16
    mean = k_seen.mean(1, keepdim=True)
    step = (k_seen - mean).abs().amax(1, keepdim=True) / 127
    turn = hadamard_matrix(q.shape[-1])
    for_q, for_k = spread(q_seen, k_seen)
    bf16 = [x.bfloat16().float() for x in (q, k)]
    return {
        "bfloat16": (bf16[0], bf16[1]),
        "float8": (q, float8(k)),
        "float8, bfloat16 queries": (bf16[0], float8(bf16[1])),
        "float8, scaled": (q / scale, float8(k * scale)),
        "float8, without the mean key": (q, float8(k - mean)),
        "float8, turned": (q @ turn, float8(k @ turn)),
        "float8, balanced and turned": (q @ for_q.transpose(-1, -2), float8(k @ for_k.transpose(-1, -2))),
        "float8, balanced and turned, without the mean key": (
            q @ for_q.transpose(-1, -2),
            float8((k - mean) @ for_k.transpose(-1, -2)),
        ),
        "int8, without the mean key": (q, step * ((k - mean) / step).round().clamp(-127, 127)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("artefact")
    parser.add_argument("--dev", nargs="+", required=True)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--calibration-length", type=int, default=4096)
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(2)
    artifact = Artifact.load(options.artefact)
    model, tokenizer = load_model(options.model, device="cpu", dtype="float32")
    check_fingerprint(model, artifact)
    sparse, heads = artifact.config, artifact.heads
    assert artifact.indexer is not None
    indexer = indexer_from_state(artifact.indexer, heads, head_dim=head_counts(model)[3], index_dim=sparse.index_dim)

    def projected(text: Tensor, seed: str):
        """By layer (capture, index queries [U, m, d], index keys [U, N, d])."""
        low = sparse.window_tokens + sparse.sink_tokens
        rows = torch.tensor(sorted(random.Random(seed).sample(range(low, len(text)), options.queries)))
        found = {}
        with torch.no_grad():
            for layer, c in capture(model, text, rows, heads).items():
                its = indexer[str(layer)]
                found[layer] = (c, its.project_queries(c.q_pre[None])[0], its.project_keys(c.k_pre[None])[0])  # type: ignore
        return found

    seen = projected(
        documents(options.dev[:1], tokenizer, length_tokens=options.calibration_length, count=1, seed=1)[0], "calibration"
    )
    keys = torch.cat([k.square().mean(1).sqrt().flatten() for _, _, k in seen.values()])
    small = torch.cat([(k.abs() < SMALLEST_NORMAL).float().mean(1).flatten() for _, _, k in seen.values()])
    largest = max(float(k.abs().max()) for _, _, k in seen.values())
    by_source, samples = {}, 0
    for source in options.dev:
        text = documents([source], tokenizer, length_tokens=options.length, count=1, seed=0)[0]
        sums: dict[str, Tensor] = {}
        truths = torch.zeros(2, dtype=torch.float64)
        rows = 0
        for layer, (c, q, k) in projected(text, source).items():
            target = target_attention(c)
            far = far_slots(c.rows, len(text), sparse.window_tokens, sparse.sink_tokens)

            def chosen(q: Tensor, k: Tensor, c=c, far=far) -> tuple[Tensor, Tensor]:
                scores = _causal(index_scores(q, k), c.rows)
                return scores, (scores >= top_p_threshold(scores, sparse.top_p, sparse.min_probability)) & far

            scores, truth = chosen(q, k)
            rows += truth.shape[0] * truth.shape[1]
            truths += torch.tensor([truth.sum(), (target * (truth | ~far)).sum()], dtype=torch.float64)
            for name, its in variants(q, k, *seen[layer][1:]).items():
                got, selected = chosen(*its)
                apart = (got - scores).masked_fill(~far, torch.nan)
                apart = apart - apart.nanmean(-1, keepdim=True)  # what all scores of a query share changes nothing
                values = [
                    (selected & truth).sum(), selected.sum(), (target * (selected | ~far)).sum(),
                    apart.square().nanmean(-1).sqrt().sum(), (target * (truth & ~selected)).sum(),
                ]  # fmt: skip
                sums[name] = sums.get(name, torch.zeros(5)) + torch.tensor([float(v) for v in values], dtype=torch.float64)
        samples = rows
        count, mass = truths.tolist()
        table = {"float32": {"tokens_selected": count / rows, "mass_kept": mass / rows}}
        for name, (both, selected, kept, apart, lost) in ((n, s.tolist()) for n, s in sums.items()):
            table[name] = {
                "recall": both / count,
                "extra": (selected - both) / count,
                "tokens_selected": selected / rows,
                "mass_kept": kept / rows,
                "mass_lost_by_tokens_left_out": lost / rows,
                "score_error_nats": apart / rows,
            }
        by_source[Path(source).name] = table
        for name, row in table.items():
            print(f"{Path(source).name:20s} {name:30s}", {key: round(value, 5) for key, value in row.items()}, flush=True)
    result = {
        "environment": environment(),
        "what": "Far tokens that the index selects with its keys stored in fewer bits, against float32 keys; base model in "
        "float32, index of stage 1. recall: share of the tokens selected with float32 keys that are selected too; "
        "extra: other tokens, as a share of the same; mass_kept: full attention on selected tokens, window and sinks; "
        "score_error_nats: root mean square over far tokens, less what all scores of a query share. Scales, means "
        "and rotations come from a document of their own.",
        "artefact": Path(options.artefact).name,
        "rule": sparse.rule,
        "window_tokens": sparse.window_tokens,
        "length_tokens": options.length,
        "calibration_length_tokens": options.calibration_length,
        "queries": options.queries,
        "query_rows_per_source": samples,
        "keys": {
            "root_mean_square_of_a_dimension": [float(x) for x in keys.quantile(torch.tensor([0.0, 0.5, 1.0]))],
            "largest": largest,
            "share_below_the_smallest_normal": [float(small.mean()), float(small.max())],
        },
        "sources": by_source,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
