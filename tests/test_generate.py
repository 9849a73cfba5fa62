"""`model.generate` with a sparse model: what comes out is what token-by-token forwards without a cache give."""

import pytest
import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from rtpurbo.attach import attached, sparsify
from rtpurbo.cache import CACHE, SparseLayer
from rtpurbo.checkpoint import Artifact
from rtpurbo.evals.needle import grade
from rtpurbo.generate import greedy, pieces, read
from rtpurbo.models import fingerprint
from rtpurbo.questions import RetrievalSample
from tiny import (
    CONFIG,
    FAMILY_NAMES,
    VOCABULARY,
    assert_same,
    head_map,
    left_padded,
    logits,
    positions,
    random_indexer,
    shared_model,
    tokens,
)

NEW = 24
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
GRANULARITIES = ("head", "group")


@pytest.fixture(params=GRANULARITIES)
def llama(request):
    """A float64 model that is sparse during the test, for each granularity."""
    model = shared_model("llama", dtype=torch.float64)
    heads = head_map(model, request.param)
    with attached(model, heads, CONFIG, random_indexer(heads)):
        yield model


def greedy_without_cache(model, ids, mask=None, new=NEW):
    """Token by token, each from one forward over everything so far."""
    for _ in range(new):
        following = logits(model, ids, mask)[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], 1)
        mask = None if mask is None else torch.cat([mask, torch.ones_like(following, dtype=torch.bool)], 1)
    return ids


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_greedy_equals_a_loop_without_cache(family, granularity):
    model = shared_model(family, dtype=torch.float64)
    heads = head_map(model, granularity)
    prompt = tokens(37)
    dense = model.generate(prompt, **GREEDY)
    with attached(model, heads, CONFIG, random_indexer(heads)):
        got = model.generate(prompt, **GREEDY)
        assert torch.equal(got, greedy_without_cache(model, prompt))
    assert not torch.equal(got, dense)
    assert got[0, 37:].unique().numel() > 5  # not stuck on one token


@pytest.mark.parametrize("length", [1, 2, 11, CONFIG.window_tokens + CONFIG.sink_tokens, 17])
def test_prompts_shorter_than_window_and_sinks(llama, length):
    prompt = tokens(length, seed=5)
    assert torch.equal(llama.generate(prompt, **GREEDY), greedy_without_cache(llama, prompt))


def test_without_cache(llama):
    prompt = tokens(30)
    assert torch.equal(llama.generate(prompt, **GREEDY, use_cache=False), llama.generate(prompt, **GREEDY))


def test_sampling_with_a_seed(llama):
    prompt = tokens(33, 2)

    def sample(seed, **options):
        torch.manual_seed(seed)
        return llama.generate(prompt, max_new_tokens=NEW, do_sample=True, top_k=20, temperature=1.5, **options)

    first = sample(1)
    assert torch.equal(first, sample(1))
    assert not torch.equal(first, sample(2))
    assert torch.equal(first, sample(1, use_cache=False))
    several = sample(3, num_return_sequences=3)
    assert several.shape == (6, 33 + NEW)
    assert several.unique(dim=0).shape[0] == 6


class Collector(BaseStreamer):
    """Keeps what a streamer is given."""

    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value.reshape(-1).tolist())

    def end(self):
        self.ended = True


def test_streaming(llama):
    prompt = tokens(30)
    streamer = Collector()
    out = llama.generate(prompt, streamer=streamer, **GREEDY)
    assert streamer.ended
    assert streamer.pieces[0] == prompt[0].tolist()
    assert [len(piece) for piece in streamer.pieces[1:]] == [1] * NEW
    assert [token for piece in streamer.pieces for token in piece] == out[0].tolist()


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_ragged_batch_equals_each_row_alone(family):
    model = shared_model(family, dtype=torch.float64)
    heads = head_map(model)
    # the last row's padding is longer than window and sinks, the one before has fewer tokens than there are sinks
    ids, mask = left_padded([40, 33, 18, 3, 1])
    with attached(model, heads, CONFIG, random_indexer(heads)):
        together = model.generate(ids, attention_mask=mask.long(), **GREEDY)
        for row, real in enumerate(mask):
            alone = model.generate(ids[row, real][None], **GREEDY)
            assert together[row, ids.shape[1] :].tolist() == alone[0, int(real.sum()) :].tolist(), f"row {row}"


@pytest.mark.parametrize("lengths", [(9, 37, 60), (37, 61), (3, 50), (5, 9), (41,)])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_prompts_read_one_by_one_and_decoded_together(family, granularity, lengths):
    model = shared_model(family, dtype=torch.float64)
    heads = head_map(model, granularity)
    prompts = [tokens(length, seed=i)[0] for i, length in enumerate(lengths)]
    dense = greedy(model, prompts, NEW)
    for end in (0, 7, 100):
        with attached(model, heads, CONFIG.with_options(dense_end_tokens=end), random_indexer(heads)):
            together = greedy(model, prompts, NEW)
            for prompt, row in zip(prompts, together, strict=True):
                assert torch.equal(model.generate(prompt[None], **GREEDY)[0, len(prompt) :], row)
    for prompt, row in zip(prompts, dense, strict=True):
        assert torch.equal(model.generate(prompt[None], **GREEDY)[0, len(prompt) :], row)


@pytest.mark.parametrize("end", [0, 8, 16, 20, 40, 64, 100])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_prompt_in_pieces_is_one_prompt(granularity, end, monkeypatch):
    model = shared_model(FAMILY_NAMES[0], dtype=torch.float64)
    heads, ids = head_map(model, granularity), tokens(64, batch=2)
    monkeypatch.setattr("rtpurbo.generate.PIECE_TOKENS", 16)
    with attached(model, heads, CONFIG.with_options(dense_end_tokens=end), random_indexer(heads)), torch.no_grad():
        whole, cut = DynamicCache(config=model.config), DynamicCache(config=model.config)
        parts = pieces(model, ids)
        assert torch.equal(torch.cat(parts, 1), ids)
        assert len(parts) == 1 + -(-(64 - max(16, min(end, 64))) // 16)
        for new in (ids, tokens(1, batch=2), tokens(1, batch=2, seed=5)):
            want = model(new, **{CACHE: whole}, logits_to_keep=1).logits[:, -1]
            got = read(model, parts if new is ids else [new], cut)
            torch.testing.assert_close(got, want)
        assert not any(layer.in_prompt for layer in cut.layers)


@pytest.mark.parametrize(
    "settings", [{}, {"dense_end_tokens": 10}, {"dense_end_tokens": 1000}, {"dense_below_tokens": 1000}]
)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_what_was_generated_is_graded_right(granularity, settings):
    """Also where a layer keeps all of its heads in full."""
    model = shared_model(FAMILY_NAMES[0], dtype=torch.float64)
    heads = head_map(model, granularity)
    with attached(model, heads, CONFIG.with_options(**settings), random_indexer(heads)):
        for seed in range(5):
            prompt = tokens(50, seed=seed)
            written = model.generate(prompt, max_new_tokens=12, do_sample=False)[0]
            sample = RetrievalSample(tokens=written, answers=((50, 62),), depth=0.5, kind="single")
            assert grade(model, [sample]) == [1.0]


def test_decoding_together_ends_when_all_rows_have(llama, monkeypatch):
    prompts = [tokens(37, seed=0)[0], tokens(50, seed=1)[0]]
    rows = greedy(llama, prompts, NEW)
    ends = {int(rows[0, 3]), int(rows[1, 7])}
    monkeypatch.setattr(llama.generation_config, "eos_token_id", sorted(ends))
    short = greedy(llama, prompts, NEW)
    stops = [min(i for i, token in enumerate(row.tolist()) if token in ends) for row in rows]
    assert short.shape[1] == max(stops) + 1
    for row, whole, stop in zip(short, rows, stops, strict=True):
        assert torch.equal(row[: stop + 1], whole[: stop + 1])
        assert (row[stop:] == whole[stop]).all()
    assert greedy(llama, prompts, NEW, finished=lambda new: new.shape[1] == 2).shape == (2, 2)


def test_rows_that_end_early(llama):
    """A finished row is fed padding tokens while the others go on; they do not change."""
    prompt = tokens(30, 3)
    free = llama.generate(prompt, **GREEDY)
    end = int(free[0, 33])
    got = llama.generate(prompt, eos_token_id=end, **GREEDY)
    for row in range(3):
        made, want = got[row, 30:].tolist(), free[row, 30:].tolist()
        stop = want.index(end) + 1 if end in want else NEW
        assert made[:stop] == want[:stop]
        assert set(made[stop:]) <= {0}


@pytest.mark.parametrize("lengths", [[30], [30, 12, 2]])
def test_several_turns_equal_one_long_prompt(llama, lengths):
    """Each turn: earlier tokens, what was generated, and a new question, on one cache."""
    ids, mask = left_padded(lengths)
    cache = DynamicCache(config=llama.config)
    for turn in range(3):
        got = llama.generate(ids, attention_mask=mask.long(), **{CACHE: cache}, **GREEDY)
        afresh = llama.generate(ids, attention_mask=mask.long(), **GREEDY)
        assert torch.equal(got, afresh), f"turn {turn}"
        assert cache.get_seq_length() == got.shape[1] - 1
        ids = torch.cat([got, tokens(7, len(lengths), seed=10 + turn)], 1)
        mask = torch.cat([mask, torch.ones(len(lengths), ids.shape[1] - mask.shape[1], dtype=torch.bool)], 1)
    assert all(isinstance(layer, SparseLayer) for layer in cache.layers)


@pytest.mark.parametrize("chunk", [1, 5, 16, 17, 64])
@pytest.mark.parametrize("lengths", [[41], [41, 20, 3]])
def test_prefill_in_chunks(llama, lengths, chunk):
    ids, mask = left_padded(lengths)
    want = llama.generate(ids, attention_mask=mask.long(), **GREEDY)
    got = llama.generate(ids, attention_mask=mask.long(), prefill_chunk_size=chunk, **GREEDY)
    assert torch.equal(got, want)


def test_logits_that_generate_returns(llama):
    ids, mask = left_padded([35, 21])
    out = llama.generate(
        ids, attention_mask=mask.long(), output_logits=True, return_dict_in_generate=True, **GREEDY
    )  # fmt: skip
    full = torch.cat([mask, torch.ones(2, NEW, dtype=torch.bool)], 1)
    want = logits(llama, out.sequences, full)[:, 34:-1]
    assert_same(torch.stack(out.logits, 1), want.float())
    assert out[CACHE].get_seq_length() == 35 + NEW - 1


def test_position_ids_given(llama):
    ids, mask = left_padded([35, 21])
    want = llama.generate(ids, attention_mask=mask.long(), **GREEDY)
    got = llama.generate(ids, attention_mask=mask.long(), position_ids=positions(mask), **GREEDY)
    assert torch.equal(got, want)


def test_beam_search_is_refused_by_name(llama):
    with pytest.raises(ValueError, match=r"Beam search is not supported by the sparse cache; use num_beams=1"):
        llama.generate(tokens(30), num_beams=2, max_new_tokens=4)


@pytest.mark.parametrize("implementation", ["static", "offloaded"])
def test_other_caches_are_refused_by_name(llama, implementation):
    with pytest.raises(ValueError, match=r"needs a transformers DynamicCache without offloading"):
        llama.generate(tokens(30), cache_implementation=implementation, max_new_tokens=4)


def test_assisted_generation_is_refused(llama):
    with pytest.raises(ValueError, match=r"cannot be rolled back, which assisted|cache that can be cropped"):
        llama.generate(tokens(30), prompt_lookup_num_tokens=3, max_new_tokens=8)


def test_sparsify_generates_and_gives_the_model_back():
    model = shared_model("qwen3", dtype=torch.float64)
    heads = head_map(model)
    indexer = {name: t.detach() for name, t in random_indexer(heads).state_dict().items()}
    artifact = Artifact(
        base_model={"name": "tiny", "fingerprint": fingerprint(model)}, config=CONFIG, heads=heads, indexer=indexer
    )  # fmt: skip
    prompt = tokens(40)
    dense = model.generate(prompt, **GREEDY)
    with sparsify(model, artifact) as sparse:
        assert sparse is model
        assert torch.equal(sparse.generate(prompt, **GREEDY), greedy_without_cache(model, prompt))
        sparse_ids = sparse.generate(prompt, **GREEDY)
    assert torch.equal(model.generate(prompt, **GREEDY), dense)
    assert not torch.equal(sparse_ids, dense)
    with sparsify(model, artifact, top_p=1.0) as sparse:
        assert not torch.equal(sparse.generate(prompt, **GREEDY), sparse_ids)
    with sparsify(model, artifact, index_dtype="float8") as sparse:
        cache = sparse(prompt, use_cache=True)[CACHE]
        assert cache.layers[0].view(None).index_k.dtype == torch.float8_e4m3fn
    with sparsify(model, artifact, dense_end_tokens=40) as sparse:
        read = sparse.generate(prompt, **GREEDY)
    assert read[0, 40] == dense[0, 40]  # the prompt says the first token
    assert not torch.equal(read, dense)
    with (
        pytest.raises(ValueError, match="index_dtype must be 'auto' or 'float8', got 'int8'"),
        sparsify(model, artifact, index_dtype="int8"),
    ):
        pass
    assert int(sparse_ids.max()) < VOCABULARY
