"""Where the tokens of every layer lie in a block of vLLM's cache. Plain arithmetic, without vLLM.

vLLM hands out blocks of one size, and a block of a group holds the same tokens of all layers of that group. A cache for
every layer would therefore cost each token what the layer with the most KV heads costs. Here the heads decide: one *full*
pool holds, in each block, the keys, values and index keys of all full KV heads of all layers; *local* pools hold the
local KV heads of some layers each, as many as fit into a block of that size. A pool is a cache group of its own, whose
blocks are freed on their own. With tensor parallelism every process has the pools and sizes of the one that needs most.

A block of `page` tokens: keys [rows, page, D], then values [rows, page, D], then index keys [units, page, d].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..config import SparseConfig
from ..heads import HeadMap
from ..indexer import FLOAT8
from ..ops import paged


@dataclass(frozen=True)
class Pool:
    """One kind of block, as one process sees it."""

    name: str
    """"full" or "local"."""
    first_layer: int
    """The first of its layers, by which it is known."""
    rows: int
    """KV heads that a block has room for."""
    units: int
    """Index units that it has room for."""
    window_tokens: int
    """Longest window of its heads; 0 for the full pool, which forgets nothing."""
    places: dict[int, tuple[int, int]]
    """Layer -> its first row and first unit."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a part of a layer has its rows in the blocks of a pool, and their shape."""

    pool: Pool
    row: int
    rows: int
    unit: int
    units: int
    head_dim: int
    index_dim: int
    float8: bool

    def pages(self, cache: Tensor) -> paged.Pages:
        """Views of the part's keys, values and index keys in a cache [blocks, 1, N, numbers of a token]."""
        size, dim = cache.shape[2], self.head_dim
        block = cache.flatten(1)

        def region(start: int, rows: int, width: int, of: Tensor = block) -> Tensor:
            return of[:, start : start + rows * size * width].unflatten(1, (rows, size, width)).transpose(1, 2)

        keys = self.pool.rows * size * dim
        index = None
        if self.units:
            inner, begin = block, 2 * keys
            if self.float8:
                inner, begin = block.view(FLOAT8), begin * block.element_size()
            index = region(begin + self.unit * size * self.index_dim, self.units, self.index_dim, inner)
        k, v = (region(start + self.row * size * dim, self.rows, dim) for start in (0, keys))
        return paged.Pages(k, v, index)


@dataclass(frozen=True)
class PageLayout:
    """All pools of a model, and what a token takes in a block of any of them."""

    pools: tuple[Pool, ...]
    token_bytes: int
    """Of a block, for each of its tokens; a multiple of `element_bytes`."""
    sink_tokens: int
    keeps_prompts: bool = False
    """Whether local pools drop nothing of a prompt before all of it is read."""

    def local_blocks(self, page: int) -> int:
        """Most blocks that all local pools keep of a sequence whose prompt is read: sinks and window, wherever it begins."""
        sinks = -(-self.sink_tokens // page)
        return sum(sinks + -(-(pool.window_tokens - 1) // page) + 1 for pool in self.pools if pool.window_tokens)

    def bytes_of(self, tokens: int, page: int) -> int:
        """Cache of a sequence in one process once its prompt is read, at most: whole blocks of all pools."""
        every = -(-tokens // page)
        local = sum(1 for pool in self.pools if pool.window_tokens)
        blocks = min(local * every, self.local_blocks(page)) + every * (len(self.pools) - local)
        return blocks * page * self.token_bytes


def page_layout(
    heads: HeadMap, config: SparseConfig, *, head_dim: int, element_bytes: int, indexed: bool, rank: int = 0, ranks: int = 1
) -> PageLayout:
    """Deal the KV heads of all converted layers out to pools.

    Args:
        heads: of the whole model.
        element_bytes: of the model's numbers.
        indexed: whether index keys are kept.

    Raises:
        ValueError: the KV heads cannot be dealt out evenly to `ranks`.
    """
    shards = [heads.shard(i, ranks) for i in range(ranks)]

    def full(shard: HeadMap, layer: int) -> int:
        return len(shard.full_kv_heads(layer))

    def local(shard: HeadMap, layer: int) -> int:
        return shard.kv_heads - full(shard, layer)

    def most(count, layers) -> int:
        return max(sum(count(shard, layer) for layer in layers) for shard in shards)

    def units_of(shard: HeadMap, layer: int) -> int:
        return len(shard.units(layer)) if indexed else 0

    def pool(name: str, layers: list[int], rows: int, units: int, window: int) -> Pool:
        count, places, at = full if name == "full" else local, {}, (0, 0)
        for layer in layers:
            here = (count(shards[rank], layer), units_of(shards[rank], layer) if name == "full" else 0)
            if here[0]:
                places[layer] = at
            at = (at[0] + here[0], at[1] + here[1])
        return Pool(name, layers[0], rows, units, window, places)

    row_bytes = 2 * head_dim * element_bytes
    layers = list(heads.layers)
    rows, units = most(full, layers), most(units_of, layers)
    with_local = [layer for layer in layers if most(local, [layer])]
    needed = rows * row_bytes + -(-units * config.index_bytes(element_bytes) // element_bytes) * element_bytes
    if not rows:
        needed = most(local, layers) * row_bytes
    token_bytes = max(needed, max((most(local, [layer]) for layer in with_local), default=0) * row_bytes)
    capacity = token_bytes // row_bytes
    bins: list[list[int]] = []
    for layer in with_local:
        room = next((group for group in bins if most(local, [*group, layer]) <= capacity), None)
        if room is None:
            bins.append([layer])
        else:
            room.append(layer)
    pools = [pool("full", layers, rows, units, 0)] if rows else []
    for group in bins:
        window = max(max(heads.local_windows(layer, config.window_tokens), default=1) for layer in group)
        pools.append(pool("local", group, capacity, 0, window))
    return PageLayout(tuple(pools), token_bytes, config.sink_tokens, config.dense_end_tokens > 0)


def memory_rows(
    heads: HeadMap, config: SparseConfig, *, head_dim: int, element_bytes: int, indexed: bool, ranks: int = 1,
    page: int = 16, lengths: tuple[int, ...] = (8192, 32768, 131072),
) -> dict[str, Any]:  # fmt: skip
    """What one of `ranks` processes keeps of a sequence, dense and sparse.

    Args:
        page: tokens of a block.
        lengths: of sequences, in tokens.

    Returns:
        "bytes_per_token" dense and sparse (beyond the window), "local_bytes" (once a sequence, at most), and "sequences":
        for each length the cache in bytes, whole blocks, dense and sparse.
    """
    layout = page_layout(heads, config, head_dim=head_dim, element_bytes=element_bytes, indexed=indexed, ranks=ranks)
    dense = len(heads.layers) * heads.kv_heads // ranks * 2 * head_dim * element_bytes
    grows = any(pool.name == "full" for pool in layout.pools)
    return {
        "bytes_per_token": {"dense": dense, "sparse": layout.token_bytes if grows else 0},
        "local_bytes": layout.local_blocks(page) * page * layout.token_bytes,
        "cache_groups": len(layout.pools),
        "sequences": {n: {"dense": -(-n // page) * page * dense, "sparse": layout.bytes_of(n, page)} for n in lengths},
    }
