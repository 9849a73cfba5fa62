"""How heads are dealt out to blocks and processes, and what is refused; without vLLM."""

from types import SimpleNamespace

import pytest
import torch

from rtpurbo.config import SparseConfig
from rtpurbo.heads import HeadMap
from rtpurbo.vllm_plugin import check, limits
from rtpurbo.vllm_plugin.layout import memory_rows, page_layout

CONFIG = SparseConfig(window_tokens=100, sink_tokens=4, index_dim=16, top_p=0.9, min_probability=0.0)


def head_map(*full: tuple[int, ...], kv_heads: int = 8, group: int = 2, windows=None) -> HeadMap:
    """Whole groups: the full KV heads of every layer."""
    rows = tuple(tuple(h for g in row for h in range(g * group, (g + 1) * group)) for row in full)
    return HeadMap(query_heads=kv_heads * group, kv_heads=kv_heads, granularity="group", retrieval=rows, windows=windows)


def layout_of(heads, config=CONFIG, **more):
    settings = {"head_dim": 64, "element_bytes": 2, "indexed": True, **more}
    return page_layout(heads, config, **settings)


def by_name(layout, name):
    return [pool for pool in layout.pools if pool.name == name]


def test_shards_hold_equal_runs_of_heads():
    heads = head_map((0, 5), (), (2, 3, 7))
    first, second = heads.shard(0, 2), heads.shard(1, 2)
    assert (first.query_heads, first.kv_heads) == (8, 4)
    assert [first.full_kv_heads(i) for i in range(3)] == [(0,), (), (2, 3)]
    assert [second.full_kv_heads(i) for i in range(3)] == [(1,), (), (3,)]
    assert heads.shard(0, 1) == heads


def test_shards_keep_windows():
    heads = head_map((0,), (), kv_heads=4, windows=((100, 7, 8, 9), (1, 2, 3, 4)))
    assert heads.shard(1, 2).windows == ((8, 9), (3, 4))


def test_uneven_shards_are_refused():
    with pytest.raises(ValueError, match="tensor parallel size must be a divisor of the 8 KV heads, got 3"):
        head_map((0,)).shard(0, 3)


def test_a_token_costs_its_full_heads_and_their_index_keys():
    layout = layout_of(head_map((0, 1), (), (3, 4, 5), *[(6,)] * 4))
    assert layout.token_bytes == 9 * 2 * 64 * 2 + 9 * 16 * 2
    (full,) = by_name(layout, "full")
    assert (full.rows, full.units, full.window_tokens) == (9, 9, 0)
    assert full.places == {0: (0, 0), 2: (2, 2), 3: (5, 5), 4: (6, 6), 5: (7, 7), 6: (8, 8)}


def test_index_keys_in_float8_take_half():
    heads, small = head_map((0, 1, 2, 3), (4, 5, 6, 7)), SparseConfig(index_dim=16, index_dtype="float8")
    assert layout_of(heads).token_bytes - layout_of(heads, small).token_bytes == 8 * 16
    assert layout_of(heads, indexed=False).token_bytes == 8 * 2 * 64 * 2


def test_local_heads_fill_blocks_of_the_same_size_and_no_layer_is_split():
    heads = head_map((0, 1, 2, 3), (), (7,), (0, 1, 2, 3, 4, 5, 6, 7), (1,))
    layout = layout_of(heads)
    pools = by_name(layout, "local")
    capacity = layout.token_bytes // (2 * 64 * 2)
    assert [sorted(pool.places) for pool in pools] == [[0, 1], [2, 4]]
    for pool in pools:
        ends = [row + 8 - len(heads.full_kv_heads(layer)) for layer, (row, _) in pool.places.items()]
        assert max(ends) <= pool.rows == capacity
        starts = sorted(row for row, _ in pool.places.values())
        assert starts[0] == 0
        assert starts[1:] == sorted(ends)[:-1]


def test_few_full_heads_do_not_make_blocks_smaller_than_a_layer():
    layout = layout_of(head_map((0,), (), ()))
    assert layout.token_bytes == 8 * 2 * 64 * 2
    assert [pool.rows for pool in by_name(layout, "local")] == [8, 8, 8]


def test_without_full_heads_there_is_one_pool():
    layout = layout_of(head_map((), ()))
    assert [pool.name for pool in layout.pools] == ["local"]
    assert layout.token_bytes == 16 * 2 * 64 * 2


def test_without_local_heads_there_is_one_pool():
    layout = layout_of(head_map(tuple(range(8)), tuple(range(8))))
    assert [pool.name for pool in layout.pools] == ["full"]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_all_processes_have_the_same_pools(ranks):
    """Whatever is the same for vLLM's scheduler, which sees one process: names, sizes, windows, members."""
    heads = head_map((0, 1, 2), (), (7,), (0, 1, 2, 3, 4, 5, 6, 7), (1, 2))
    layouts = [layout_of(heads, rank=rank, ranks=ranks) for rank in range(ranks)]
    seen = {
        (
            layout.token_bytes,
            tuple((p.name, p.first_layer, p.rows, p.units, p.window_tokens) for p in layout.pools),
        )
        for layout in layouts
    }
    assert len(seen) == 1
    for rank, layout in enumerate(layouts):
        shard = heads.shard(rank, ranks)
        for pool in layout.pools:
            for layer, (row, unit) in pool.places.items():
                count = len(shard.full_kv_heads(layer))
                assert row + (count if pool.name == "full" else shard.kv_heads - count) <= pool.rows
                assert unit + (count if pool.name == "full" else 0) <= max(pool.units, 0)
        for layer in heads.layers:
            homes = {pool.name for pool in layout.pools if layer in pool.places}
            count = len(shard.full_kv_heads(layer))
            assert homes == {name for name, n in (("full", count), ("local", shard.kv_heads - count)) if n}


def test_single_heads_have_an_index_unit_each():
    heads = HeadMap(query_heads=8, kv_heads=2, granularity="head", retrieval=((0, 1, 5), (2,)))
    layout = layout_of(heads)
    (full,) = by_name(layout, "full")
    assert (full.rows, full.units) == (3, 4)
    assert full.places == {0: (0, 0), 1: (2, 3)}


def test_a_pool_has_the_longest_window_of_its_layers():
    heads = head_map((0, 1), (0, 1), kv_heads=2, windows=((100, 100), (100, 100)))
    assert by_name(layout_of(heads), "local") == []
    ladder = head_map((0,), (0,), (), kv_heads=2, windows=((100, 20), (100, 30), (10, 15)))
    pools = by_name(layout_of(ladder), "local")
    assert {tuple(sorted(pool.places)): pool.window_tokens for pool in pools} == {(0, 1): 30, (2,): 15}


def test_bytes_of_a_sequence():
    layout = layout_of(head_map((0, 1, 2, 3), ()))  # the local heads of a layer fill one pool each
    assert [pool.rows for pool in layout.pools] == [4, 8, 8]
    block = 16 * layout.token_bytes
    assert layout.local_blocks(16) == 2 * (1 + 7 + 1)  # sinks, 99 tokens of the window, and one more where they begin late
    assert layout.bytes_of(32, 16) == 3 * 2 * block
    assert layout.bytes_of(16000, 16) == (1000 + 18) * block


def settings(**changes):
    """vLLM's settings as far as they are looked at."""
    values = {
        "speculative_config": None, "kv_transfer_config": None,
        "parallel": {"decode_context_parallel_size": 1, "pipeline_parallel_size": 1, "tensor_parallel_size": 1,
                     "enable_dbo": False, "prefill_context_parallel_size": 1},
        "cache": {"cache_dtype": "auto", "kv_sharing_fast_prefill": False, "enable_prefix_caching": True},
        "scheduler": {"disable_hybrid_kv_cache_manager": False},
    }  # fmt: skip
    for name, value in changes.items():
        home = next((section for section in ("parallel", "cache", "scheduler") if name in values[section]), None)
        (values[home] if home else values)[name] = value
    sections = {f"{name}_config": SimpleNamespace(**values.pop(name)) for name in ("parallel", "cache", "scheduler")}
    return SimpleNamespace(**values, **sections, model_config=SimpleNamespace(dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"speculative_config": object()}, "speculative decoding"),
        ({"decode_context_parallel_size": 2}, "decode context parallelism"),
        ({"prefill_context_parallel_size": 2}, "prefill context parallelism"),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"enable_dbo": True}, "--enable-dbo"),
        ({"cache_dtype": "fp8"}, "a quantised KV cache .--kv-cache-dtype fp8"),
        ({"cache_dtype": "float16"}, "--kv-cache-dtype float16; the model's dtype is bfloat16"),
        ({"kv_transfer_config": object()}, "a KV connector"),
        ({"kv_sharing_fast_prefill": True}, "fast prefill"),
        ({"disable_hybrid_kv_cache_manager": True}, "--disable-hybrid-kv-cache-manager"),
        ({"tensor_parallel_size": 3}, "8 KV heads cannot be dealt out to 3 processes"),
        ({"tensor_parallel_size": 16}, "8 KV heads cannot be dealt out to 16 processes"),
    ],
)
def test_refusals_name_the_setting(asked, named):
    with pytest.raises(ValueError, match=named):
        limits.check(settings(**asked), head_map((0,)), CONFIG, "")


def test_what_is_supported_passes():
    limits.check(settings(cache_dtype="bfloat16", tensor_parallel_size=4), head_map((0,)), CONFIG, "")


def test_dense_below_tokens_is_refused():
    config = SparseConfig(window_tokens=100, dense_below_tokens=500)
    with pytest.raises(ValueError, match="dense_below_tokens"):
        limits.check(settings(), head_map((0,)), config, "")


def test_prefix_caching_is_refused_where_it_would_be_wrong():
    with pytest.raises(ValueError, match=r"start vLLM with --no-enable-prefix-caching"):
        limits.check(settings(), head_map((0,)), CONFIG, "SlidingWindowManager has no x")
    limits.check(settings(enable_prefix_caching=False), head_map((0,)), CONFIG, "SlidingWindowManager has no x")


def test_dense_and_sparse_memory_of_a_sequence():
    heads = head_map((0, 1, 2, 3), ())
    found = memory_rows(heads, CONFIG, head_dim=64, element_bytes=2, indexed=True, lengths=(1600,))
    layout = layout_of(heads)
    assert found["bytes_per_token"] == {"dense": 16 * 2 * 64 * 2, "sparse": layout.token_bytes}
    assert found["sequences"] == {1600: {"dense": 1600 * 16 * 2 * 64 * 2, "sparse": layout.bytes_of(1600, 16)}}
    assert found["local_bytes"] == 18 * 16 * layout.token_bytes
    nothing_full = memory_rows(head_map((), ()), CONFIG, head_dim=64, element_bytes=2, indexed=False, lengths=(1600,))
    assert nothing_full["bytes_per_token"]["sparse"] == 0


def test_the_doctor_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(check, "_version", lambda name: None)
    with pytest.raises(ValueError, match=r"vLLM is not installed; run `pip install 'rtpurbo\[vllm\]'`"):
        check.check_vllm()
    monkeypatch.setattr(check, "_version", lambda name: "0")
    monkeypatch.setattr(check.importlib.metadata, "entry_points", lambda group: SimpleNamespace(names=set()))
    with pytest.raises(ValueError, match="rtpurbo is not installed by pip"):
        check.check_vllm()
