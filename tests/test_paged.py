"""Attention over blocks laid out as vLLM has them: every sequence as if it were alone, by PyTorch and by the kernels
(through Triton's interpreter where there is no GPU)."""

import dataclasses

import pytest
import torch

from rtpurbo.config import SparseConfig
from rtpurbo.heads import HeadMap
from rtpurbo.indexer import stored_keys
from rtpurbo.ops import paged, sparse_attention
from rtpurbo.vllm_plugin.layout import Place, page_layout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
TOLERANCE = 2e-2 if DEVICE == "cuda" else 1e-5
DIM, INDEX_DIM, SCALING, PAGE, BLOCKS = 16, 4, 0.25, 16, 64
CONFIG = SparseConfig(window_tokens=30, sink_tokens=3, index_dim=INDEX_DIM, top_p=0.6, min_probability=0.0)
LENGTHS = [130, 57, 31, 9, 1]
RETRIEVAL = {
    "group": [(2, 3), (), (0, 1, 4, 5)],
    "head": [(0, 1, 4), (3,), (0, 3, 5)],
}
SETTINGS = {
    "top-p": {},
    "least probability": {"top_p": 1.0, "min_probability": 0.02},
    "no sinks": {"sink_tokens": 0},
    "float8": {"index_dtype": "float8"},
}


def head_map(granularity, windows=False):
    ladder = ((30, 30, 8), (12, 30, 20), (30, 9, 30)) if windows else None
    if windows and granularity == "head":
        ladder = ((30, 9, 30), (12, 30, 20), (30, 30, 30))
    rows = tuple(RETRIEVAL[granularity])
    return HeadMap(query_heads=6, kv_heads=3, granularity=granularity, retrieval=rows, windows=ladder)


class Blocks:
    """The caches of all pools, NaN where nothing was written, and each sequence's blocks in random order."""

    def __init__(self, heads, config, indexed=True):
        self.heads, self.config, self.indexed = heads, config, indexed
        self.layout = page_layout(heads, config, head_dim=DIM, element_bytes=DTYPE.itemsize, indexed=indexed)
        width = self.layout.token_bytes // DTYPE.itemsize
        shape = (BLOCKS, 1, PAGE, width)
        self.caches = [torch.full(shape, torch.nan, dtype=DTYPE, device=DEVICE) for _ in self.layout.pools]
        each = -(-max(LENGTHS) // PAGE)
        table = 1 + torch.randperm(BLOCKS - 1, device=DEVICE)[: each * len(LENGTHS)]
        self.table = table.view(len(LENGTHS), each).int()

    def part(self, layer, name):
        """(KV heads, query heads, part, pages) of a layer, or None."""
        heads, config = self.heads, self.config
        full = heads.full_kv_heads(layer)
        rows = [row for row in range(heads.kv_heads) if (row in full) == (name == "full")]
        if not rows:
            return None
        (number,) = (i for i, p in enumerate(self.layout.pools) if p.name == name and layer in p.places)
        pool = self.layout.pools[number]
        retrieval = heads.retrieval_heads(layer)
        mine = [head for row in rows for head in heads.group(row)]
        windows = heads.kv_windows(layer, config.window_tokens)
        units = len(heads.units(layer)) if name == "full" and self.indexed else 0
        part = paged.Part(
            full=name == "full",
            head_units=tuple(retrieval.index(h) // heads.heads_per_unit if h in retrieval else -1 for h in mine),
            windows=tuple(windows[row] for row in rows),
            sink_tokens=config.sink_tokens,
            scaling=SCALING,
            top_p=config.top_p,
            min_probability=config.min_probability,
        )
        row, unit = pool.places[layer]
        place = Place(
            pool=pool, row=row, rows=len(rows), unit=unit, units=units, head_dim=DIM, index_dim=INDEX_DIM,
            float8=config.index_dtype == "float8",
        )  # fmt: skip
        return rows, mine, part, place.pages(self.caches[number])

    def slots(self, sequence, first, stop):
        """Where the tokens of a sequence are stored."""
        token = torch.arange(first, stop, device=DEVICE)
        return self.table[sequence, token // PAGE].long() * PAGE + token % PAGE

    def forget(self, pages, sequence, first, window):
        """What vLLM frees before the token `first` is computed: blocks between sinks and window."""
        sinks = -(-self.config.sink_tokens // PAGE)
        for i in range(sinks, max(0, first - window + 1) // PAGE):
            pages.k[self.table[sequence, i]] = pages.v[self.table[sequence, i]] = torch.nan


def tokens(heads, config, layer):
    """Random (q, k, v, index_q, index_k) of every sequence, [1, H, T, D] each."""
    units = len(heads.units(layer))
    out = []
    for length in LENGTHS:
        q, k, v = 2 * torch.randn(1, 6, length, DIM), torch.randn(1, 3, length, DIM), torch.randn(1, 3, length, DIM)
        index_q, index_k = 1.5 * torch.randn(1, units, length, INDEX_DIM), torch.randn(1, units, length, INDEX_DIM)
        index_k = stored_keys(index_k, config.index_dtype, DTYPE).to(DTYPE)
        out.append([x.to(DEVICE, DTYPE) for x in (q, k, v, index_q, index_k)])
    return out


def truth(heads, config, layer, inputs, indexed=True):
    q, k, v, index_q, index_k = inputs
    return sparse_attention(
        q, k, v, *((index_q, index_k) if indexed else (None, None)), retrieval_heads=heads.retrieval_heads(layer),
        heads_per_unit=heads.heads_per_unit, window_tokens=heads.kv_windows(layer, config.window_tokens),
        sink_tokens=config.sink_tokens, top_p=config.top_p, min_probability=config.min_probability, scaling=SCALING,
    )[0].transpose(0, 1)  # fmt: skip


@pytest.mark.parametrize("windows", [False, True], ids=["one window", "ladder"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("granularity", RETRIEVAL)
def test_prompts_in_pieces_then_decode(granularity, setting, windows):
    heads, config = head_map(granularity, windows), dataclasses.replace(CONFIG, **SETTINGS[setting])
    check(heads, config, paged.decode)


@pytest.mark.parametrize("granularity", RETRIEVAL)
def test_without_an_index_retrieval_heads_are_dense(granularity):
    check(head_map(granularity), CONFIG, paged.decode, indexed=False)


@pytest.mark.parametrize("setting", ["top-p", "float8"])
@pytest.mark.parametrize("granularity", RETRIEVAL)
def test_decode_kernels_read_blocks(granularity, setting):
    pytest.importorskip("triton", reason="the kernels need Triton")
    config = dataclasses.replace(CONFIG, **SETTINGS[setting])
    check(head_map(granularity, windows=True), config, paged.decode_by_kernels)


def check(heads, config, decode, indexed=True):
    """Prompts in pieces, all tokens but the last; then one decode step of all sequences together."""
    blocks = Blocks(heads, config, indexed)
    for layer in heads.layers:
        inputs = tokens(heads, config, layer)
        want = [truth(heads, config, layer, one, indexed) for one in inputs]
        for name in ("full", "local"):
            found = blocks.part(layer, name)
            if found is None:
                continue
            rows, mine, part, pages = found
            index = name == "full" and indexed
            for i, (q, k, v, index_q, index_k) in enumerate(inputs):
                for start in range(0, LENGTHS[i] - 1, 50):
                    stop = min(start + 50, LENGTHS[i] - 1)
                    here = [
                        x[0, :, start:stop].transpose(0, 1) for x in (q[:, mine], k[:, rows], v[:, rows], index_q, index_k)
                    ]
                    paged.write(pages, blocks.slots(i, start, stop), here[1], here[2], here[4] if index else None)
                    if name == "local":
                        blocks.forget(pages, i, start, max(part.windows))
                    got = paged.prefill(here[0], here[3] if index else None, pages, blocks.table[i], stop, part)
                    torch.testing.assert_close(got, want[i][start:stop, mine], atol=TOLERANCE, rtol=TOLERANCE)
                last = [x[0, :, -1:].transpose(0, 1) for x in (k[:, rows], v[:, rows], index_k)]
                paged.write(pages, blocks.slots(i, LENGTHS[i] - 1, LENGTHS[i]), *last[:2], last[2] if index else None)
                if name == "local":
                    blocks.forget(pages, i, LENGTHS[i] - 1, max(part.windows))
            q = torch.stack([one[0][0, mine, -1] for one in inputs]).unflatten(1, (len(rows), -1))
            index_q = torch.stack([one[3][0, :, -1] for one in inputs]) if index else None
            lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=DEVICE)
            for longest in (max(LENGTHS), blocks.table.shape[1] * PAGE):
                got = decode(q, index_q, pages, blocks.table, lengths, longest, part).flatten(1, 2)
                torch.testing.assert_close(got, torch.stack([one[-1, mine] for one in want]), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(("first", "gone"), [(0, []), (100, []), (100, [1, 2])])
def test_the_end_of_a_piece_is_dense_over_what_is_there(first, gone):
    heads, length, end = head_map("head"), max(LENGTHS), 9
    blocks = Blocks(heads, CONFIG)
    i, group = LENGTHS.index(length), 2
    q, k, v, index_q, index_k = tokens(heads, CONFIG, 0)[i]
    for name in ("full", "local"):
        rows, mine, part, pages = blocks.part(0, name)
        index = name == "full"
        some = [x[0].transpose(0, 1) for x in (q[:, mine], k[:, rows], v[:, rows], index_q, index_k)]
        paged.write(pages, blocks.slots(i, 0, length), some[1], some[2], some[4] if index else None)
        table, there = blocks.table[i].clone(), torch.ones(length, dtype=torch.bool, device=DEVICE)
        for page in gone if name == "local" else []:
            table[page] = 0
            there[page * PAGE : (page + 1) * PAGE] = False
        ends = {}
        for tokens_of_it in (0, end, length):
            dense = dataclasses.replace(part, dense_end_tokens=tokens_of_it)
            query = some[0][first:], some[3][first:] if index else None
            ends[tokens_of_it] = paged.prefill(*query, pages, table, length, dense)
        keys, values = (x[0, rows].repeat_interleave(group, 0) for x in (k, v))  # [H, N, D]
        seen = there & (torch.arange(length, device=DEVICE) <= torch.arange(first, length, device=DEVICE)[:, None])
        logits = (q[0, mine, first:].float() @ keys.float().transpose(-1, -2)) * SCALING
        want = (logits.masked_fill(~seen, -torch.inf).softmax(-1) @ values.float()).transpose(0, 1).to(DTYPE)
        torch.testing.assert_close(ends[end][-end:], want[-end:], atol=TOLERANCE, rtol=TOLERANCE)
        if not gone:  # else what the window lacks is not a question of its end
            torch.testing.assert_close(ends[length], want, atol=TOLERANCE, rtol=TOLERANCE)
            assert torch.equal(ends[end][:-end], ends[0][:-end])
        assert (ends[end][-end:] - ends[0][-end:]).abs().max() > 0.1


def test_tokens_that_are_none_are_written_to_block_0():
    blocks = Blocks(head_map("group"), CONFIG)
    rows, _, _, pages = blocks.part(0, "full")
    k, v, index_k = torch.ones(2, len(rows), DIM), torch.ones(2, len(rows), DIM), torch.ones(2, 1, INDEX_DIM)
    paged.write(pages, torch.tensor([-1, 3 * PAGE + 2], device=DEVICE), *(x.to(DEVICE, DTYPE) for x in (k, v, index_k)))
    written = (~pages.k.isnan()).any(-1).nonzero()[:, :2].tolist()
    assert written == [[0, 0], [3, 2]]


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("granularity", RETRIEVAL)
def test_a_cuda_graph_replays_a_decode_step_at_other_lengths(granularity):
    heads = head_map(granularity)
    blocks = Blocks(heads, CONFIG)
    for cache in blocks.caches:
        cache.normal_()
    longest = blocks.table.shape[1] * PAGE
    rows, mine, part, pages = blocks.part(0, "full")
    q = torch.randn(len(LENGTHS), len(rows), len(mine) // len(rows), DIM, device=DEVICE, dtype=DTYPE)
    index_q = torch.randn(len(LENGTHS), len(heads.units(0)), INDEX_DIM, device=DEVICE, dtype=DTYPE)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=DEVICE)
    paged.decode(q, index_q, pages, blocks.table, lengths, longest, part)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged.decode(q, index_q, pages, blocks.table, lengths, longest, part)
    for now in (LENGTHS, [9, 100, 1, 64, 144], [0, 3, 0, 17, 40]):
        lengths.copy_(torch.tensor(now, dtype=torch.int32))
        graph.replay()
        want = paged.decode(q, index_q, pages, blocks.table, lengths, longest, part)
        seen = [i for i, length in enumerate(now) if length]
        torch.testing.assert_close(out[seen], want[seen])
        assert out.isfinite().all()
