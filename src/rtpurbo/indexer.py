"""The learned low-dimensional index: two small projections per retrieval head or KV group (paper, section 3.2).

Shapes: B batch, T tokens, Hq query heads, Hkv KV heads, D head dimension, U index units of a layer, S query heads per
unit, d index dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config import IndexDtype
from .heads import HeadMap

FLOAT8 = torch.float8_e4m3fn
"""What float8 index keys are stored in. Its numbers are relatively as precise anywhere between 1/64 and 448, and index keys
lie there, so no scale is needed (`docs/log.md`)."""


class LayerIndexer(nn.Module):
    """Index projections of one layer: `query` [U, d, S*D] and `key` [U, d, D], without bias."""

    query_heads: Tensor
    kv_heads: Tensor

    def __init__(self, heads: HeadMap, layer: int, *, head_dim: int, index_dim: int):
        super().__init__()
        if index_dim > head_dim:
            raise ValueError(f"index_dim must be at most the head dimension {head_dim}, got {index_dim}.")
        self.heads_per_unit = heads.heads_per_unit
        self.register_buffer("query_heads", torch.tensor(heads.retrieval_heads(layer)), persistent=False)
        self.register_buffer("kv_heads", torch.tensor(heads.units(layer)), persistent=False)
        units, size = len(heads.units(layer)), heads.heads_per_unit
        self.query = nn.Parameter(torch.empty(units, index_dim, size * head_dim))
        self.key = nn.Parameter(torch.empty(units, index_dim, head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random start: scores of unit variance for unit-variance inputs, scaled like attention logits."""
        nn.init.normal_(self.query, std=self.query.shape[-1] ** -0.5)
        nn.init.normal_(self.key, std=self.key.shape[-1] ** -0.5)

    def unit_queries(self, q_pre: Tensor) -> Tensor:
        """The query heads of every unit side by side: [B, Hq, T, D] -> [B, U, T, S*D]."""
        q = q_pre.index_select(1, self.query_heads).unflatten(1, (-1, self.heads_per_unit))  # [B, U, S, T, D]
        return q.transpose(2, 3).flatten(3)

    def project_queries(self, q_pre: Tensor) -> Tensor:
        """Index queries [B, U, T, d] from pre-RoPE queries [B, Hq, T, D]."""
        with torch.autocast(q_pre.device.type, enabled=False):  # scores decide what is kept: always in full precision
            return torch.einsum("buti,udi->butd", self.unit_queries(q_pre).to(self.query.dtype), self.query)

    def project_keys(self, k_pre: Tensor) -> Tensor:
        """Index keys [B, U, T, d] from pre-RoPE keys [B, Hkv, T, D]."""
        with torch.autocast(k_pre.device.type, enabled=False):
            return torch.einsum("buti,udi->butd", k_pre.index_select(1, self.kv_heads).to(self.key.dtype), self.key)


def stored_keys(index_k: Tensor, index_dtype: IndexDtype, dtype: torch.dtype) -> Tensor:
    """Index keys as a cache of numbers of `dtype` holds them. All that scores sees these, so that what is selected depends
    neither on how a prompt is cut nor on whether it is read or written."""
    if index_dtype == "auto":
        return index_k.to(dtype)
    largest = torch.finfo(FLOAT8).max
    return index_k.clamp(-largest, largest).to(FLOAT8)  # beyond it some versions of PyTorch give NaN


def make_indexer(heads: HeadMap, *, head_dim: int, index_dim: int) -> nn.ModuleDict:
    """One LayerIndexer per layer that has retrieval heads, keyed by the layer's number as a string."""
    return nn.ModuleDict(
        {
            str(layer): LayerIndexer(heads, layer, head_dim=head_dim, index_dim=index_dim)
            for layer in heads.layers
            if heads.retrieval_heads(layer)
        }
    )


def indexer_from_state(state: dict[str, Tensor], heads: HeadMap, *, head_dim: int, index_dim: int) -> nn.ModuleDict:
    """The indexer with the tensors of an artefact; ValueError when names or shapes do not fit the head map."""
    indexer = make_indexer(heads, head_dim=head_dim, index_dim=index_dim)
    want = {name: tuple(t.shape) for name, t in indexer.state_dict().items()}
    got = {name: tuple(t.shape) for name, t in state.items()}
    if want != got:
        name = sorted(set(want.items()) ^ set(got.items()))[0][0]
        raise ValueError(
            f"The indexer does not fit the head map: tensor {name!r} should be {want.get(name, 'absent')}, "
            f"is {got.get(name, 'absent')}. Train the indexer again for this head map."
        )
    indexer.load_state_dict({name: t.float() for name, t in state.items()})
    return indexer
