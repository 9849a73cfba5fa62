"""Stage 1: captures, the closed-form start, training, measuring; on a model whose far head is known and on random ones."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rtpurbo import indexer_training
from rtpurbo.config import IndexerConfig, SparseConfig
from rtpurbo.data import documents
from rtpurbo.heads import HeadMap
from rtpurbo.indexer_training import (
    MEASURED_DOCUMENTS,
    QUESTION_TOKENS,
    capture,
    closed_form_start,
    kl_divergence,
    measure,
    target_attention,
    train_indexer,
    unit_scores,
)
from tiny_text import artifact_for, copy_model, everything_of, random_model

LENGTH = 160
CONFIG = IndexerConfig(steps=8, learning_rate=1e-3, length_tokens=LENGTH, queries=16, documents=6, save_every=3, seed=1)
MAPS = {
    "head": ((1,), (0, 2, 3)),
    "group": ((0, 1), (2, 3)),
    "one layer": ((), (2,)),
}


@pytest.fixture(scope="module")
def model():
    return copy_model()


def artifact(model, name: str, **kwargs):
    return artifact_for(model, MAPS[name], granularity="group" if name == "group" else "head", **kwargs)


def metrics_of(result) -> dict:
    return result.stages["train_indexer"]["metrics"]


def assert_same_indexer(a, b) -> None:
    assert a.indexer.keys() == b.indexer.keys()
    for name in a.indexer:
        assert torch.equal(a.indexer[name], b.indexer[name]), name
    assert metrics_of(a) == metrics_of(b)


@torch.no_grad()
def true_attention(model, tokens) -> list[torch.Tensor]:
    """Per layer [Hq, N, N], from Transformers' own eager attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return [a[0] for a in model(tokens[None], output_attentions=True).attentions]
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def projections(model, tokens) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per layer the outputs of q_proj [Hq, N, D] and k_proj [Hkv, N, D]."""
    seen, hooks = {}, []
    for i, layer in enumerate(model.model.layers):
        for name in ("q_proj", "k_proj"):
            module = getattr(layer.self_attn, name)
            hooks.append(module.register_forward_hook(lambda m, a, out, key=(i, name): seen.__setitem__(key, out[0])))
    model(tokens[None])
    for hook in hooks:
        hook.remove()
    dim = model.config.head_dim
    split = {key: x.unflatten(-1, (-1, dim)).transpose(0, 1) for key, x in seen.items()}
    return [(split[i, "q_proj"], split[i, "k_proj"]) for i in range(len(model.model.layers))]


@pytest.mark.parametrize("name", MAPS)
def test_targets_are_the_models_attention(model, tokenizer, source, name):
    heads = artifact(model, name).heads
    tokens = documents([source], tokenizer, length_tokens=LENGTH, count=1, seed=5)[0]
    rows = torch.tensor([0, 1, 7, 80, LENGTH - 1])
    got = capture(model, tokens, rows, heads)
    truth = true_attention(model, tokens)
    assert set(got) == {i for i, chosen in enumerate(MAPS[name]) if chosen}
    for layer, c in got.items():
        target = target_attention(c)
        want = truth[layer][list(MAPS[name][layer])][:, rows]
        want = want.unflatten(0, (-1, heads.heads_per_unit)).mean(1)
        torch.testing.assert_close(target, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", MAPS)
def test_scores_are_the_projected_products(model, tokenizer, source, name):
    made = artifact(model, name)
    result = train_indexer(model, tokenizer, made, [source], dataclasses.replace(CONFIG, steps=2, save_every=0))
    tokens = documents([source], tokenizer, length_tokens=LENGTH, count=1, seed=5)[0]
    rows = torch.tensor([3, 90, LENGTH - 1])
    indexer = indexer_training.indexer_from_state(result.indexer, made.heads, head_dim=64, index_dim=8)
    before = projections(model, tokens)
    for layer, c in capture(model, tokens, rows, made.heads).items():
        scores = unit_scores(indexer[str(layer)], c)
        q, k = before[layer]
        size = made.heads.heads_per_unit
        for unit, kv_head in enumerate(made.heads.units(layer)):
            own = MAPS[name][layer][unit * size : (unit + 1) * size]
            wq, wk = result.indexer[f"{layer}.query"][unit], result.indexer[f"{layer}.key"][unit]
            for i, row in enumerate(rows.tolist()):
                index_q = wq @ torch.cat([q[h, row] for h in own])
                want = (k[kv_head, : row + 1] @ wk.T) @ index_q
                torch.testing.assert_close(scores[unit, i, : row + 1], want, atol=1e-3, rtol=1e-4)
                assert (scores[unit, i, row + 1 :] == -math.inf).all()


def test_kl_against_pytorch():
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 10, requires_grad=True)
    hidden = torch.arange(10) > torch.tensor([4, 9, 0])[:, None]
    target = torch.randn(2, 3, 10).masked_fill(hidden, -math.inf).softmax(-1)
    masked = scores.masked_fill(hidden, -math.inf)
    got = kl_divergence(target, masked)
    for unit in range(2):
        want = 0.0
        for row, seen in enumerate((5, 10, 1)):
            log_index = masked[unit, row, :seen].log_softmax(-1)
            want += torch.nn.functional.kl_div(log_index, target[unit, row, :seen], reduction="sum") / 3
        torch.testing.assert_close(got[unit], want)
    got.sum().backward()
    # the gradient of the KL by the scores is (softmax - target) / rows
    torch.testing.assert_close(scores.grad, (masked.softmax(-1) - target).detach() / 3)


@pytest.mark.parametrize("name", MAPS)
def test_closed_form_beats_a_random_start(model, tokenizer, source, name):
    made = artifact(model, name)
    kl, mass = {}, {}
    for start in ("random", "closed_form"):
        config = dataclasses.replace(CONFIG, steps=0, start=start)
        metrics = metrics_of(train_indexer(model, tokenizer, made, [source], config))
        kl[start], mass[start] = metrics["kl"], metrics["mass_kept"]
        assert metrics["loss_first"] is None
    assert kl["closed_form"] < 0.4 * kl["random"]
    assert mass["closed_form"] > mass["random"] + 0.05


def test_closed_form_finds_attention_that_is_a_low_rank_product():
    """Without RoPE, attention logits are a bilinear form; a form of rank d must be found exactly."""
    torch.manual_seed(0)
    heads = HeadMap(query_heads=2, kv_heads=1, granularity="head", retrieval=((0, 1),))
    indexer = indexer_training.make_indexer(heads, head_dim=16, index_dim=4)
    captures, rows = [], torch.arange(200, 400)
    mix = torch.randn(2, 4, 16), torch.randn(4, 16)
    for _ in range(3):
        q, k = (
            torch.randn(2, 200, 16),
            torch.randn(400, 16) + torch.arange(16) / 4,
        )  # a mean that every key shares says nothing
        low_q = torch.einsum("hmd,hrd->hmr", q, mix[0]) @ mix[1]
        captures.append({0: indexer_training.Capture(rows, q, low_q[:, None], k[None], k.expand(2, -1, -1), 0.05)})
    closed_form_start(indexer, captures)
    for c in captures:
        target, scores = target_attention(c[0]), unit_scores(indexer["0"], c[0])
        uniform = kl_divergence(target, torch.where(scores.isinf(), scores, torch.zeros_like(scores)))
        assert (kl_divergence(target, scores) < 0.05 * uniform).all()


@pytest.mark.parametrize("near_as_one", [True, False])
@pytest.mark.parametrize("start", ["random", "closed_form"])
@pytest.mark.parametrize("name", MAPS)
def test_steps_reduce_the_kl_of_unseen_documents(model, tokenizer, source, name, start, near_as_one):
    made = artifact(model, name)
    config = dataclasses.replace(
        CONFIG,
        start=start,
        steps=40,
        learning_rate=4e-3,
        queries=32,
        save_every=0,
        far_weighting=False,
        retrieval_ratio=0.0,
        near_as_one=near_as_one,
    )
    before = metrics_of(train_indexer(model, tokenizer, made, [source], dataclasses.replace(config, steps=0)))
    after = metrics_of(train_indexer(model, tokenizer, made, [source], config))
    assert after["kl"] < {"random": 0.6, "closed_form": 0.995}[start] * before["kl"]
    assert after["loss_last"] < after["loss_first"]


def test_far_weights_are_far_mass():
    torch.manual_seed(0)
    sparse = SparseConfig(window_tokens=5, sink_tokens=2)
    rows = torch.tensor([19, 3, 12])
    target = torch.rand(2, 3, 20).masked_fill(torch.arange(20) > rows[:, None], 0.0)
    got = indexer_training.far_weights(target, rows, sparse)
    for unit in range(2):
        for i, row in enumerate(rows.tolist()):
            far = sum(target[unit, i, slot].item() for slot in range(2, row - 4))
            assert got[unit, i].item() == pytest.approx(far + indexer_training.LEAST_WEIGHT, rel=1e-5)


def test_weighted_kl():
    torch.manual_seed(0)
    target, scores, weights = torch.randn(2, 3, 9).softmax(-1), torch.randn(2, 3, 9), torch.rand(2, 3)
    alone = torch.stack([kl_divergence(target[:, i : i + 1], scores[:, i : i + 1]) for i in range(3)], 1)
    want = (alone * weights).sum(1) / weights.sum(1)
    torch.testing.assert_close(kl_divergence(target, scores, weights), want)


def test_kl_with_near_tokens_as_one_class():
    """The same as the KL of distributions in which window and sinks were added up by hand; never above the plain one."""
    torch.manual_seed(0)
    rows = torch.tensor([19, 3, 12])
    far = indexer_training.far_slots(rows, 20, 5, 2)
    later = torch.arange(20) > rows[:, None]
    target = torch.randn(2, 3, 20).masked_fill(later, -math.inf).softmax(-1)
    scores = torch.randn(2, 3, 20).masked_fill(later, -math.inf).requires_grad_()
    got = kl_divergence(target, scores, torch.tensor([[1.0, 0, 0], [0, 1, 0]]), far)
    index = scores.softmax(-1)
    for unit, row in ((0, 0), (1, 1)):
        split = [torch.cat([p[far[row]], p[~far[row]].sum()[None]]) for p in (target[unit, row], index[unit, row])]
        want = (split[0] * (split[0] / split[1]).log()).sum()
        torch.testing.assert_close(got[unit], want)
    assert got[1].item() == pytest.approx(0, abs=1e-6)  # position 3 has nothing far
    assert (kl_divergence(target, scores, None, far) < kl_divergence(target, scores)).all()
    got.sum().backward()
    assert scores.grad.isfinite().all()
    assert scores.grad[0, 0, far[0]].abs().amin() > 0
    assert scores.grad[1, 1].abs().amax() < 1e-6


@pytest.mark.parametrize("weighting", [True, False])
@pytest.mark.parametrize("near_as_one", [True, False])
def test_steps_weigh_queries_by_their_far_mass(model, tokenizer, source, monkeypatch, weighting, near_as_one):
    real, seen = kl_divergence, []

    def watch(target, scores, weights=None, far=None):
        seen.append((target, weights, far))
        return real(target, scores, weights, far)

    monkeypatch.setattr(indexer_training, "kl_divergence", watch)
    rows = []
    real_target = target_attention
    monkeypatch.setattr(indexer_training, "target_attention", lambda c: rows.append(c.rows) or real_target(c))
    made = artifact(model, "one layer")
    config = dataclasses.replace(
        CONFIG, start="random", steps=3, far_weighting=weighting, near_as_one=near_as_one, save_every=0
    )
    train_indexer(model, tokenizer, made, [source], config)
    for (target, weights, far), at in list(zip(seen, rows, strict=True))[: config.steps]:
        assert (far is not None) == near_as_one
        if near_as_one:
            want = indexer_training.far_slots(at, LENGTH, made.config.window_tokens, made.config.sink_tokens)
            assert torch.equal(far, want)
        if weighting:
            assert torch.equal(weights, indexer_training.far_weights(target, at, made.config))
        else:
            assert weights is None


def test_queries_of_answers_are_used_in_every_step(model, tokenizer, source, monkeypatch):
    from rtpurbo.questions import mixed_document

    config = dataclasses.replace(CONFIG, retrieval_ratio=1.0, steps=7, queries=4, save_every=0)
    texts = documents([source], tokenizer, length_tokens=LENGTH, count=config.documents + MEASURED_DOCUMENTS, seed=1)
    wanted = [
        mixed_document(text, tokenizer, retrieval_ratio=1.0, seed=f"{config.seed}:index:{i}")
        for i, text in enumerate(texts[: config.documents])
    ]
    seen, captured = [], []
    real_target, real_capture = indexer_training.target_attention, indexer_training.capture
    monkeypatch.setattr(indexer_training, "target_attention", lambda c: seen.append(c.rows.tolist()) or real_target(c))
    monkeypatch.setattr(
        indexer_training, "capture", lambda m, tokens, *rest: captured.append(tokens) or real_capture(m, tokens, *rest)
    )
    train_indexer(model, tokenizer, artifact(model, "one layer"), [source], dataclasses.replace(config, start="random"))
    for turn, rows in enumerate(seen[: config.steps]):
        _, answers, _ = wanted[indexer_training._shuffled(turn, config.documents, config.seed)]
        assert answers
        always = sorted({*answers, *range(LENGTH - QUESTION_TOKENS, LENGTH)})
        assert rows[: len(always)] == always
        assert len(rows) == len(always) + config.queries
    assert {tuple(t.tolist()) for t in captured} == {
        *(tuple(t.tolist()) for t, _, _ in wanted),
        *(tuple(t.tolist()) for t in texts[-MEASURED_DOCUMENTS:]),
    }


@pytest.mark.parametrize("name", MAPS)
def test_documents_run_again_give_the_same_result(model, tokenizer, source, name, monkeypatch):
    runs = []
    real = indexer_training.capture
    monkeypatch.setattr(indexer_training, "capture", lambda *args: runs.append(1) or real(*args))
    made = artifact(model, name)
    config = dataclasses.replace(CONFIG, steps=14, save_every=0)
    kept = train_indexer(model, tokenizer, made, [source], config)
    once = len(runs)
    assert once == CONFIG.documents + MEASURED_DOCUMENTS
    again = train_indexer(model, tokenizer, made, [source], dataclasses.replace(config, capture_gib=1e-9))
    assert len(runs) - once == 4 + config.steps + MEASURED_DOCUMENTS
    assert_same_indexer(kept, again)


def test_captured_bytes_are_counted(model, tokenizer, source):
    heads = artifact(model, "head").heads
    tokens = documents([source], tokenizer, length_tokens=LENGTH, count=1, seed=5)[0]
    for c in capture(model, tokens, torch.arange(0, LENGTH, 4), heads).values():
        held = sum(t.untyped_storage().nbytes() for t in (c.q_pre, c.q, c.k_pre, c.k))
        assert held <= c.nbytes() * 1.01


def test_every_document_comes_once_per_round():
    for number in range(3):
        turns = [indexer_training._shuffled(t, 7, 3) for t in range(7 * number, 7 * number + 7)]
        assert sorted(turns) == list(range(7))
    assert [indexer_training._shuffled(t, 7, 3) for t in range(7)] != [
        indexer_training._shuffled(t, 7, 3) for t in range(7, 14)
    ]


def test_batch_of_two_is_the_mean_of_two_documents(model, tokenizer, source):
    """First step from one start: the loss of batch_size=2 is the mean of those of turns 0 and 1."""
    made = artifact(model, "head")
    both = train_indexer(model, tokenizer, made, [source], dataclasses.replace(CONFIG, steps=1, batch_size=2, save_every=0))
    config = dataclasses.replace(CONFIG, steps=2, learning_rate=1e-12, save_every=0)
    single = metrics_of(train_indexer(model, tokenizer, made, [source], config))
    want = (single["loss_first"] + single["loss_last"]) / 2
    assert metrics_of(both)["loss_first"] == pytest.approx(want, rel=1e-4)


def brute_force_measure(model, made, indexer, texts, queries: int) -> dict[tuple[int, int], list[float]]:
    """kl, mass kept, far ratio, selected tokens of every unit, by loops over queries and tokens."""
    sparse, size = made.config, made.heads.heads_per_unit
    found: dict[tuple[int, int], list[list[float]]] = {}
    for number, tokens in enumerate(texts):
        truth, before = true_attention(model, tokens), projections(model, tokens)
        low = sparse.window_tokens + sparse.sink_tokens
        rows = random.Random(f"measure:{number}").choices(range(low, len(tokens)), k=queries)
        for layer, chosen in enumerate(made.heads.retrieval):
            q, k = before[layer]
            for unit, kv_head in enumerate(made.heads.units(layer)):
                own = chosen[unit * size : (unit + 1) * size]
                for row in rows:
                    target = truth[layer][list(own), row].mean(0)[: row + 1].double()
                    index_q = indexer[f"{layer}.query"][unit] @ torch.cat([q[h, row] for h in own])
                    scores = ((k[kv_head, : row + 1] @ indexer[f"{layer}.key"][unit].T) @ index_q).double()
                    index = scores.softmax(-1)
                    is_far = [row - s >= sparse.window_tokens and s >= sparse.sink_tokens for s in range(row + 1)]
                    pairs = list(zip(is_far, target.tolist(), index.tolist(), strict=True))
                    near_mass = [sum(pair[i] for pair in pairs if not pair[0]) for i in (1, 2)]
                    kl = near_mass[0] * math.log(near_mass[0] / near_mass[1])
                    kl += sum(t * math.log(t / i) for away, t, i in pairs if away and t > 0)
                    grid = (16 * scores).floor()
                    below = grid.max() - grid
                    weights = torch.where(below < 256, (-below / 16).exp(), 0.0)
                    steps = 1
                    while weights[below <= steps].sum() < sparse.top_p * weights.sum():
                        steps += 1
                    while steps > 1 and (-steps / 16 < math.log(sparse.min_probability * weights.sum() + 1e-30)):
                        steps -= 1
                    limit = (grid.max() - steps) / 16
                    mass = far = taken = 0.0
                    for slot in range(row + 1):
                        near = row - slot < sparse.window_tokens or slot < sparse.sink_tokens
                        selected = bool(scores[slot] >= limit)
                        mass += target[slot].item() * (near or selected)
                        far += not near
                        taken += selected and not near
                    found.setdefault((layer, unit), []).append([kl, mass, taken / max(far, 1), taken])
    return {unit: torch.tensor(v).mean(0).tolist() for unit, v in found.items()}


def test_measure_scores_the_keys_that_a_cache_holds(tokenizer, source):
    model = random_model()
    made = artifact(model, "group", window_tokens=24, top_p=0.8)
    texts = documents([source], tokenizer, length_tokens=96, count=1, seed=5)
    torch.manual_seed(3)
    indexer = indexer_training.make_indexer(made.heads, head_dim=16, index_dim=8)
    small = dataclasses.replace(made.config, index_dtype="float8")
    got = measure(model, indexer, texts, made.heads, small, queries=12)
    unrounded = measure(model, indexer, texts, made.heads, made.config, queries=12)

    def rounded(self, k_pre, project=indexer_training.LayerIndexer.project_keys):
        return project(self, k_pre).to(torch.float8_e4m3fn).float()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexer_training.LayerIndexer, "project_keys", rounded)
        want = measure(model, indexer, texts, made.heads, made.config, queries=12)
    assert got["kl"] == want["kl"] != unrounded["kl"]
    assert got["units"] == want["units"]


@pytest.mark.parametrize(("name", "least"), [("head", 0.0), ("group", 0.0), ("group", 0.01)])
def test_measure_against_brute_force(tokenizer, source, name, least):
    model = random_model()
    made = artifact(model, name, window_tokens=24, top_p=0.8, min_probability=least)
    texts = documents([source], tokenizer, length_tokens=96, count=2, seed=5)
    torch.manual_seed(3)
    indexer = indexer_training.make_indexer(made.heads, head_dim=16, index_dim=8)
    state = {n: t.clone() for n, t in indexer.state_dict().items()}
    got = measure(model, state, texts, made.heads, made.config, queries=12)
    want = brute_force_measure(model, made, state, texts, 12)
    names = ("kl", "mass_kept", "far_selected_ratio", "tokens_selected")
    assert [(u["layer"], u["unit"]) for u in got["units"]] == sorted(want)
    for unit in got["units"]:
        assert [unit[n] for n in names] == pytest.approx(want[unit["layer"], unit["unit"]], rel=1e-3, abs=1e-4)
    for i, n in enumerate(names):
        assert got[n] == pytest.approx(sum(w[i] for w in want.values()) / len(want), rel=1e-3)
    assert (got["length_tokens"], got["documents"]) == (96, 2)
    assert 0 < got["tokens_selected"] < 68


@pytest.mark.parametrize(
    ("name", "rule"), [("top_p", {"top_p": 0.9}), ("min_probability", {"top_p": 1.0, "min_probability": 1e-4})]
)
def test_a_rule_for_a_mass_target(model, tokenizer, source, name, rule):
    made = artifact(model, "head", **rule)
    config = dataclasses.replace(CONFIG, save_every=0)
    plain = metrics_of(train_indexer(model, tokenizer, made, [source], config))
    curve = {point[name]: point for point in plain["curve"]}
    assert plain[name] == getattr(made.config, name)
    assert list(curve) == sorted(curve, reverse=name != "top_p")
    masses = [point["mass_kept"] for point in curve.values()]
    assert masses == sorted(masses)
    assert masses[0] < masses[3] < masses[-1]
    chosen = list(curve)[3]
    target = (masses[3] + masses[2]) / 2
    done = train_indexer(model, tokenizer, made, [source], dataclasses.replace(config, mass_target=target))
    assert getattr(done.config, name) == metrics_of(done)[name] == chosen
    assert metrics_of(done)["mass_kept"] == pytest.approx(masses[3])
    alone = dataclasses.replace(made, config=done.config)
    again = metrics_of(train_indexer(model, tokenizer, alone, [source], config))
    assert again["units"] == metrics_of(done)["units"]
    most = train_indexer(model, tokenizer, made, [source], dataclasses.replace(config, mass_target=0.9999999))
    assert getattr(most.config, name) == list(curve)[-1]


def test_measuring_everything_selected(model, tokenizer, source):
    made = artifact(model, "head")
    texts = documents([source], tokenizer, length_tokens=LENGTH, count=1, seed=5)
    indexer = indexer_training.make_indexer(made.heads, head_dim=64, index_dim=8)
    everything = SparseConfig(window_tokens=48, top_p=1.0, min_probability=0.0)
    got = measure(model, indexer, texts, made.heads, everything)
    assert got["mass_kept"] == pytest.approx(1.0, abs=1e-5)
    assert got["far_selected_ratio"] == pytest.approx(1.0, abs=1e-2)  # the first far query has nothing far


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation's result had."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return out


@pytest.mark.parametrize("start", ["random", "closed_form"])
def test_no_attention_matrix_of_a_whole_document_is_held(tokenizer, source, start):
    model = random_model(context=1024)
    made = artifact_for(model, ((0, 1, 2, 3), (0, 1, 2, 3)))
    config = IndexerConfig(steps=2, length_tokens=1024, queries=8, documents=2, start=start, save_every=0)
    with LargestTensor() as largest:
        train_indexer(model, tokenizer, made, [source], config)
    assert largest.elements < 1024 * 1024  # not even of one head; a step's rows of four heads are 4 x 8 x 1024


class Killed(Exception):
    pass


@pytest.mark.parametrize("kill_at", [1, 3, 7])
def test_resume_is_bitwise_the_same(model, tokenizer, source, tmp_path, monkeypatch, kill_at):
    made = artifact(model, "head")
    want = train_indexer(model, tokenizer, made, [source], CONFIG)
    real, calls = indexer_training.kl_divergence, []

    def killing(*args):
        calls.append(1)
        if len(calls) > 2 * kill_at:  # two layers a step
            raise Killed
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(indexer_training, "kl_divergence", killing)
        with pytest.raises(Killed):
            train_indexer(model, tokenizer, made, [source], CONFIG, work=tmp_path)
    assert_same_indexer(train_indexer(model, tokenizer, made, [source], CONFIG, work=tmp_path), want)


def test_a_state_of_other_heads_is_not_resumed(model, tokenizer, source, tmp_path):
    made, other = artifact(model, "head"), artifact(model, "one layer")
    train_indexer(model, tokenizer, other, [source], CONFIG, work=tmp_path)
    got = train_indexer(model, tokenizer, made, [source], CONFIG, work=tmp_path)
    assert_same_indexer(got, train_indexer(model, tokenizer, made, [source], CONFIG))


def test_nan_names_the_step_and_leaves_the_model_alone(tokenizer, source, tmp_path, monkeypatch):
    model = copy_model()
    before = everything_of(model)
    real, calls = indexer_training.kl_divergence, []

    def bad(*args):
        calls.append(1)
        return real(*args) * (math.nan if len(calls) == 5 else 1.0)

    monkeypatch.setattr(indexer_training, "kl_divergence", bad)
    made = artifact(model, "one layer")
    with pytest.raises(ValueError, match=r"Stage 1.*nan.*step 4; the state after step 3 is kept"):
        train_indexer(model, tokenizer, made, [source], CONFIG, work=tmp_path)
    assert everything_of(model) == before


@pytest.mark.parametrize("training", [False, True])
def test_the_model_comes_back_unchanged(tokenizer, source, training):
    model = copy_model()
    model.train(training)
    model.model.layers[0].requires_grad_(False)
    before = everything_of(model)
    result = train_indexer(model, tokenizer, artifact(model, "head"), [source], CONFIG)
    assert everything_of(model) == before
    assert result.stages["train_indexer"]["settings"]["queries"] == CONFIG.queries
    assert set(result.indexer) == {f"{layer}.{kind}" for layer in (0, 1) for kind in ("query", "key")}
    assert result.weights_kind is None


def test_fewer_tokens_than_queries(model, tokenizer, source):
    config = dataclasses.replace(CONFIG, queries=10 * LENGTH, steps=2, documents=1)
    assert math.isfinite(metrics_of(train_indexer(model, tokenizer, artifact(model, "head"), [source], config))["kl"])


def test_same_seed_same_result_other_seed_another(model, tokenizer, source):
    made = artifact(model, "one layer")
    first, second, other = (
        train_indexer(model, tokenizer, made, [source], dataclasses.replace(CONFIG, seed=seed)) for seed in (1, 1, 2)
    )
    assert_same_indexer(first, second)
    assert not torch.equal(first.indexer["1.query"], other.indexer["1.query"])


def test_wrong_inputs_are_named(model, tokenizer, source, tmp_path):
    made = artifact(model, "head")
    short = tmp_path / "short.txt"
    short.write_text("a few words only")

    def run(artifact=made, sources=(source,), **changes):
        train_indexer(model, tokenizer, artifact, list(sources), dataclasses.replace(CONFIG, **changes))

    with pytest.raises(ValueError, match="made for other weights"):
        run(dataclasses.replace(made, base_model={**made.base_model, "fingerprint": "0" * 64}))
    with pytest.raises(ValueError, match="513 tokens is beyond the model's context of 512"):
        run(length_tokens=513)
    with pytest.raises(ValueError, match=r"not longer than window \+ sinks"):
        run(length_tokens=52)
    with pytest.raises(ValueError, match="too little text"):
        run(sources=(str(short),))
