"""vLLM's own models, made sparse after they are built: no model file is copied.

In every converted attention module two things are exchanged. `rotary_emb` also computes index queries and keys, from what it
is given, queries and keys before RoPE, and hands them on behind the rotated ones. `attn` deals its heads out to a retrieval
part and a local part, each an attention layer of vLLM's with our backend. The cache belongs to pools (`layout`): a pool is
an attention layer that is never called, whose cache the parts share, as vLLM lets layers share a cache.

Shapes: T tokens, Hq query heads and Hkv KV heads of this process, D head dimension, U index units, d index dimension.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import FullAttentionSpec

from ..checkpoint import EXPORTED_KEY, read_roles
from ..config import SparseConfig
from ..heads import HeadMap
from ..indexer import LayerIndexer, stored_keys
from ..ops.paged import Part
from . import compat, limits
from .backend import PagedBackend
from .cache import SinkWindowSpec
from .layout import PageLayout, Place, Pool, page_layout


class IndexedRotary(nn.Module):
    """RoPE that also returns index queries and keys: q [T, Hq*D] -> [T, Hq*D + U*d], k [T, Hkv*D] -> [T, Hkv*D + U*d]."""

    def __init__(self, inner: nn.Module, indexer: LayerIndexer, config: SparseConfig, head_dim: int):
        super().__init__()
        self.inner, self.indexer = inner, indexer
        self.index_dtype, self.head_dim = config.index_dtype, head_dim

    def forward(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Index first: some kernels of RoPE write over what they are given."""
        before = [x.unflatten(-1, (-1, self.head_dim)).transpose(0, 1)[None] for x in (q, k)]  # [1, H, T, D]
        index_q = self.indexer.project_queries(before[0]).to(q.dtype)
        index_k = stored_keys(self.indexer.project_keys(before[1]), self.index_dtype, k.dtype).to(k.dtype)
        flat = [x[0].transpose(0, 1).flatten(1) for x in (index_q, index_k)]
        q, k = self.inner(positions, q, k)
        return torch.cat([q, flat[0]], -1), torch.cat([k, flat[1]], -1)


class CachePool(Attention):
    """Holds the blocks of a pool for the parts of its layers; never called."""

    def __init__(self, pool: Pool, layout: PageLayout, old: Attention):
        name = f"{old.layer_name}.{pool.name}_pool"
        super().__init__(1, old.head_size, 1.0, num_kv_heads=1, attn_backend=PagedBackend, prefix=name)
        self.pool, self.layout, self.num_heads = pool, layout, old.num_heads

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> Any:
        """Blocks whose tokens take what the layout says, as one head of as many numbers."""
        width = self.layout.token_bytes // self.kv_cache_torch_dtype.itemsize
        shape = {"num_kv_heads": 1, "head_size": width, "head_size_v": 0, "dtype": self.kv_cache_torch_dtype}
        shape["block_size"] = vllm_config.cache_config.block_size
        if not self.pool.window_tokens:
            return FullAttentionSpec(**shape)
        return SinkWindowSpec(
            sliding_window=self.pool.window_tokens, sink_tokens=self.layout.sink_tokens,
            keeps_prompts=self.layout.keeps_prompts, **shape,
        )  # fmt: skip


class PartAttention(Attention):
    """Some KV heads of a layer: packed queries, keys and values -> [T, query heads * D]."""

    def __init__(self, part: Part, place: Place, home: CachePool, old: Attention, name: str):
        super().__init__(
            len(part.head_units), old.head_size, part.scaling, num_kv_heads=place.rows, attn_backend=PagedBackend,
            prefix=name, kv_sharing_target_layer_name=home.layer_name, part=part, place=place,
        )  # fmt: skip
        self.width = len(part.head_units) * old.head_size
        self.impl.context = get_current_vllm_config().model_config.max_model_len
        self.num_heads = old.num_heads  # one set of metadata for all layers of a pool, whatever their parts

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        """As `PagedImpl.forward`."""
        output = query.new_empty(query.shape[0], self.width)
        compat.attend(query, key, value, output, self.layer_name)
        return output


class SplitAttention(nn.Module):
    """Takes the place of a layer's attention: q, k as `IndexedRotary` gives them, v [T, Hkv*D] -> [T, Hq*D]."""

    full_rows: Tensor
    local_rows: Tensor
    back: Tensor

    def __init__(
        self, old: Attention, heads: HeadMap, layer: int, config: SparseConfig, units: int, homes: dict[str, CachePool]
    ):
        super().__init__()
        self.kv_heads, self.index_width = heads.kv_heads, units * config.index_dim
        full = list(heads.full_kv_heads(layer))
        rows_of = {"full": full, "local": [head for head in range(heads.kv_heads) if head not in full]}
        self.parts = nn.ModuleDict()
        for name, rows in rows_of.items():
            if rows:
                self.parts[name] = self._part(name, rows, old, heads, layer, config, units, homes[name])
            self.register_buffer(f"{name}_rows", torch.tensor(rows, dtype=torch.long), persistent=False)
        order = [*rows_of["full"], *rows_of["local"]]
        self.register_buffer("back", torch.tensor([order.index(row) for row in range(heads.kv_heads)]), persistent=False)

    @staticmethod
    def _part(
        name: str, rows: list[int], old: Attention, heads: HeadMap, layer: int, config: SparseConfig, units: int,
        home: CachePool,
    ) -> PartAttention:  # fmt: skip
        unit_of = {head: i // heads.heads_per_unit for i, head in enumerate(heads.retrieval_heads(layer))}
        windows = heads.kv_windows(layer, config.window_tokens)
        part = Part(
            full=name == "full",
            head_units=tuple(unit_of.get(head, -1) for row in rows for head in heads.group(row)),
            windows=tuple(windows[row] for row in rows),
            sink_tokens=config.sink_tokens,
            scaling=old.impl.scale,
            top_p=config.top_p,
            min_probability=config.min_probability,
            tile_probability=config.tile_probability,
            dense_end_tokens=config.dense_end_tokens,
        )
        row, unit = home.pool.places[layer]
        place = Place(
            pool=home.pool,
            row=row,
            rows=len(rows),
            unit=unit,
            units=units if part.full else 0,
            head_dim=old.head_size,
            index_dim=config.index_dim,
            float8=config.index_dtype == "float8",
        )
        return PartAttention(part, place, home, old, f"{old.layer_name}.{name}")

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Each part with its own heads; the results in the order of the heads."""
        (q, index_q), (k, index_k) = (x.tensor_split([x.shape[-1] - self.index_width], -1) for x in (q, k))
        q, k, v = (x.unflatten(-1, (self.kv_heads, -1)) for x in (q, k, v))
        out = []
        for name, rows in (("full", self.full_rows), ("local", self.local_rows)):
            if name not in self.parts:
                continue
            mine = [x.index_select(1, rows).flatten(1) for x in (q, k, v)]
            if name == "full" and self.index_width:
                mine[0], mine[1] = torch.cat([mine[0], index_q], -1), torch.cat([mine[1], index_k], -1)
            out.append(self.parts[name](*mine).unflatten(-1, (len(rows), -1)))
        return torch.cat(out, 1).index_select(1, self.back).flatten(1)


class Sparse(nn.Module):
    """What our classes add to vLLM's: roles out of the config, exchanged attention, index weights."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        settings = getattr(vllm_config.model_config.hf_config, EXPORTED_KEY, None)
        if not isinstance(settings, dict):
            raise ValueError(f"config.json has no section {EXPORTED_KEY!r}; write the model with `rtpurbo export`.")
        heads, config = read_roles(settings)
        limits.check(vllm_config, heads, config, compat.prefix_caching_problem(SlidingWindowManager))
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.indexed = "indexer" in settings and config.selects
        self.rank, self.ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        self.head_map = heads
        self._make_sparse(vllm_config, heads, config)

    def _make_sparse(self, vllm_config: VllmConfig, heads: HeadMap, config: SparseConfig) -> None:
        """Exchange `rotary_emb` and `attn` of every converted layer."""
        modules: dict[int, Any] = {}
        for module in self.modules():
            attention: Any = getattr(module, "attn", None)
            if type(attention) is Attention:
                modules[extract_layer_index(attention.layer_name)] = module
        if tuple(sorted(modules)) != heads.layers:
            mine, its = (", ".join(map(str, layers)) for layers in (heads.layers, sorted(modules)))
            raise ValueError(f"The head map converts layers {mine}; this vLLM's model has full attention in {its}.")
        if any(getattr(module, "do_llama_4_scaling", False) for module in modules.values()):
            raise ValueError("A model that scales queries by their position cannot be served by RTPurbo.")
        first: Attention = modules[heads.layers[0]].attn
        head_dim = first.head_size
        layout = page_layout(
            heads, config, head_dim=head_dim, element_bytes=vllm_config.model_config.dtype.itemsize, indexed=self.indexed,
            rank=self.rank, ranks=self.ranks,
        )  # fmt: skip
        context = vllm_config.compilation_config.static_forward_context
        for module in modules.values():
            del context[module.attn.layer_name]
        pools = [CachePool(pool, layout, modules[pool.first_layer].attn) for pool in layout.pools]
        self.pools = nn.ModuleList(pools)
        shard = heads.shard(self.rank, self.ranks)
        for layer, module in modules.items():
            units = len(shard.units(layer)) if self.indexed else 0
            if units:
                indexer = LayerIndexer(shard, layer, head_dim=head_dim, index_dim=config.index_dim)
                module.rotary_emb = IndexedRotary(module.rotary_emb, indexer.float().requires_grad_(False), config, head_dim)
            homes = {home.pool.name: home for home in pools if layer in home.pool.places}
            module.attn = SplitAttention(module.attn, shard, layer, config, units, homes)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """vLLM's own loading, and our index projections, of which a process takes those of its units.

        Raises:
            ValueError: a projection is missing or of another shape.
        """
        targets = {name: p for name, p in self.named_parameters() if ".rotary_emb.indexer." in name}
        by_layer = {(extract_layer_index(name), name.rsplit(".", 1)[1]): name for name in targets}
        found: set[str] = set()

        def others() -> Iterable[tuple[str, Tensor]]:
            for name, tensor in weights:
                ours = re.fullmatch(r"(\d+)\.(query|key)", name)
                if ours is None:
                    yield name, tensor
                elif target := by_layer.get((int(ours[1]), ours[2])):
                    found.add(target)
                    self._load_units(int(ours[1]), targets[target], tensor)

        loaded = super().load_weights(others()) or set()  # type: ignore[misc]
        missing = sorted(set(targets) - found)
        if missing:
            raise ValueError(f"The index projections of {missing[0]!r} are not among the weights; export the model again.")
        return {name for name in loaded if ".rotary_emb.indexer." not in name} | found

    def _load_units(self, layer: int, parameter: nn.Parameter, tensor: Tensor) -> None:
        before = sum(len(self.head_map.shard(rank, self.ranks).units(layer)) for rank in range(self.rank))
        mine = tensor[before : before + len(parameter)]
        if mine.shape != parameter.shape:
            raise ValueError(
                f"The index projections of layer {layer} have the shape {tuple(tensor.shape)}, which does not fit the head "
                "map; export the model again."
            )
        parameter.data.copy_(mine)


class RTPurboLlamaForCausalLM(Sparse, LlamaForCausalLM):
    """A sparse Llama."""


class RTPurboMistralForCausalLM(Sparse, MistralForCausalLM):
    """A sparse Mistral."""


class RTPurboQwen2ForCausalLM(Sparse, Qwen2ForCausalLM):
    """A sparse Qwen2."""


class RTPurboQwen3ForCausalLM(Sparse, Qwen3ForCausalLM):
    """A sparse Qwen3."""


class RTPurboQwen3MoeForCausalLM(Sparse, Qwen3MoeForCausalLM):
    """A sparse Qwen3 mixture of experts."""
