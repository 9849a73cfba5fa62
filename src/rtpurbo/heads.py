"""HeadMap: which query heads retrieve from far away, and what follows for KV heads and index units."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from .config import Granularity, _require, from_dict


@dataclass(frozen=True, kw_only=True)
class HeadMap:
    """Roles of all heads of a model.

    An *index unit* is what makes one selection: a retrieval query head (granularity "head", the paper), or all query
    heads of a retrieval KV group (granularity "group"). A KV head is *full* when one of its query heads retrieves;
    the cache of the others keeps sinks and window only.
    """

    query_heads: int
    """Query heads per layer."""
    kv_heads: int
    """Key/value heads per layer."""
    granularity: Granularity
    """Unit of choice: "head" or "group"."""
    retrieval: tuple[tuple[int, ...] | None, ...]
    """Per layer the retrieval query heads, ascending; None for a layer that is left as it is."""
    windows: tuple[tuple[int, ...] | None, ...] | None = None
    """The window ladder: per layer the window of every KV head in tokens, None for a layer that is left as it is. Full KV
    heads, local query heads on them too, have the whole window_tokens. None without a ladder: so has every KV head."""

    def __post_init__(self) -> None:
        _require(self.granularity in ("head", "group"), "granularity", "'head' or 'group'", self.granularity)
        _require(
            self.kv_heads >= 1 and self.query_heads % self.kv_heads == 0,
            "query_heads",
            f"a multiple of kv_heads ({self.kv_heads})",
            self.query_heads,
        )
        for layer, heads in enumerate(self.retrieval):
            if heads is None:
                continue
            in_range = all(0 <= h < self.query_heads for h in heads) and list(heads) == sorted(set(heads))
            _require(in_range, f"retrieval[{layer}]", f"ascending heads below {self.query_heads}", heads)
            if self.granularity == "group":
                whole = set(heads) == {h for g in self.full_kv_heads(layer) for h in self.group(g)}
                _require(whole, f"retrieval[{layer}]", "made of whole KV groups", heads)
        if self.windows is None:
            return
        count = len(self.retrieval)
        _require(len(self.windows) == count, "windows", f"one entry for each of {count} layers", self.windows)
        for layer, (heads, windows) in enumerate(zip(self.retrieval, self.windows, strict=True)):
            expected = "null, as the layer is left as it is"
            fits = windows is None
            if heads is not None:
                expected = f"{self.kv_heads} windows (one per KV head) of at least 1 token"
                fits = windows is not None and len(windows) == self.kv_heads and min(windows) >= 1
            _require(fits, f"windows[{layer}]", expected, windows)

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.query_heads // self.kv_heads

    @property
    def heads_per_unit(self) -> int:
        """Query heads that share one selection."""
        return self.group_size if self.granularity == "group" else 1

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the converted layers."""
        return tuple(i for i, heads in enumerate(self.retrieval) if heads is not None)

    def group(self, kv_head: int) -> range:
        """Query heads of one KV head."""
        return range(kv_head * self.group_size, (kv_head + 1) * self.group_size)

    def retrieval_heads(self, layer: int) -> tuple[int, ...]:
        """Retrieval query heads of a layer, ascending; empty for a layer left as it is."""
        return self.retrieval[layer] or ()

    def full_kv_heads(self, layer: int) -> tuple[int, ...]:
        """KV heads whose whole cache is kept, ascending."""
        return tuple(sorted({h // self.group_size for h in self.retrieval_heads(layer)}))

    def units(self, layer: int) -> tuple[int, ...]:
        """KV head of every index unit, in the order of their query heads."""
        heads = self.retrieval_heads(layer)
        return tuple(h // self.group_size for h in heads[:: self.heads_per_unit])

    def check_windows(self, window_tokens: int) -> None:
        """ValueError where a window is longer than `window_tokens`, or that of a full KV head is not just that."""
        for layer in self.layers if self.windows is not None else ():
            for head, window in enumerate(self.kv_windows(layer, window_tokens)):
                full = head in self.full_kv_heads(layer)
                name = f"windows[{layer}] of {'full' if full else 'local'} KV head {head}"
                expected = f"{'' if full else 'at most '}window_tokens ({window_tokens})"
                _require(window == window_tokens if full else window <= window_tokens, name, expected, window)

    def kv_windows(self, layer: int, window_tokens: int) -> tuple[int, ...]:
        """Window of every KV head of a converted layer, in tokens."""
        return (self.windows and self.windows[layer]) or (window_tokens,) * self.kv_heads

    def local_windows(self, layer: int, window_tokens: int) -> tuple[int, ...]:
        """Windows of the local KV heads of a converted layer, in tokens, in the order of the heads."""
        full = self.full_kv_heads(layer)
        return tuple(w for head, w in enumerate(self.kv_windows(layer, window_tokens)) if head not in full)

    def held_windows(self, window_tokens: int) -> list[int]:
        """Of every local KV head the window that its cache holds, in tokens: the longest of its layer's local ones."""
        by_layer = [self.local_windows(i, window_tokens) for i in self.layers]
        return [max(windows) for windows in by_layer for _ in windows]

    def window_counts(self, window_tokens: int) -> dict[int, int]:
        """How many local KV heads have which window, in tokens, ascending."""
        return dict(sorted(Counter(w for i in self.layers for w in self.local_windows(i, window_tokens)).items()))

    @property
    def ratio(self) -> float:
        """Share of query heads (of converted layers) that retrieve."""
        total = len(self.layers) * self.query_heads
        return sum(len(self.retrieval_heads(i)) for i in self.layers) / max(total, 1)

    @property
    def full_kv_ratio(self) -> float:
        """Share of KV heads (of converted layers) whose whole cache is kept."""
        total = len(self.layers) * self.kv_heads
        return sum(len(self.full_kv_heads(i)) for i in self.layers) / max(total, 1)

    @classmethod
    def uniform(cls, *, layers: list[int], num_layers: int, query_heads: int, kv_heads: int, dense: bool) -> HeadMap:
        """Every head of `layers` a retrieval head (dense=True) or a local one (dense=False)."""
        heads = tuple(range(query_heads)) if dense else ()
        return cls(
            query_heads=query_heads,
            kv_heads=kv_heads,
            granularity="head",
            retrieval=tuple(heads if i in layers else None for i in range(num_layers)),
        )

    @classmethod
    def from_scores(
        cls,
        scores: list[list[float] | None],
        *,
        kv_heads: int,
        granularity: Granularity,
        ratio: float,
        threshold: float | None = None,
    ) -> HeadMap:
        """Choose the highest scores over the whole model: a share `ratio`, or all that reach `threshold`.

        Args:
            scores: per layer one score per query head, None for a layer left as it is. A group's score is the
                maximum of its query heads.
        """
        rows = [row for row in scores if row is not None]
        if not rows:
            raise ValueError("Nothing to choose from: no layer has scores.")
        for layer, row in enumerate(scores):
            if row is not None and not all(map(math.isfinite, row)):
                raise ValueError(f"The scores of layer {layer} must be finite numbers, got {row}.")
        query_heads = len(rows[0])
        size = query_heads // kv_heads if granularity == "group" else 1
        ranked = sorted(
            ((max(row[u * size : (u + 1) * size]), -layer, -u) for layer, row in enumerate(scores) if row is not None
             for u in range(query_heads // size)),
            reverse=True,
        )  # fmt: skip
        keep = max(1, round(ratio * len(ranked)))
        if threshold is not None:
            keep = sum(score >= threshold for score, _, _ in ranked)
            if keep == 0:
                raise ValueError(f"No head reaches threshold={threshold}; the highest score is {ranked[0][0]:.3f}.")
        chosen = {(-layer, -u) for _, layer, u in ranked[:keep]}
        retrieval = tuple(
            None if row is None else tuple(h for h in range(query_heads) if (layer, h // size) in chosen)
            for layer, row in enumerate(scores)
        )
        return cls(query_heads=query_heads, kv_heads=kv_heads, granularity=granularity, retrieval=retrieval)

    def shard(self, rank: int, ranks: int) -> HeadMap:
        """The heads of one of `ranks` tensor-parallel processes, which hold equal runs of KV heads in order.

        Raises:
            ValueError: the KV heads cannot be dealt out evenly.
        """
        expected = f"a divisor of the {self.kv_heads} KV heads"
        _require(self.kv_heads % ranks == 0, "tensor parallel size", expected, ranks)
        query, kv = self.query_heads // ranks, self.kv_heads // ranks
        mine = range(rank * query, (rank + 1) * query)
        rows = [None if row is None else tuple(h - mine.start for h in row if h in mine) for row in self.retrieval]
        windows = self.windows and tuple(row and row[rank * kv : (rank + 1) * kv] for row in self.windows)
        return dataclasses.replace(self, query_heads=query, kv_heads=kv, retrieval=tuple(rows), windows=windows)

    def overlap(self, other: HeadMap) -> float:
        """Share of this map's retrieval heads that `other` chose too."""
        mine = {(i, h) for i in self.layers for h in self.retrieval_heads(i)}
        theirs = {(i, h) for i in other.layers for h in other.retrieval_heads(i)}
        return len(mine & theirs) / max(len(mine), 1)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict, the artefact's `heads` section."""
        values: dict[str, Any] = {
            "query_heads": self.query_heads,
            "kv_heads": self.kv_heads,
            "granularity": self.granularity,
            "retrieval": [None if heads is None else list(heads) for heads in self.retrieval],
        }
        if self.windows is not None:
            values["windows"] = [None if row is None else list(row) for row in self.windows]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> HeadMap:
        """Inverse of `to_dict`; ValueError for unknown or impossible entries."""
        tables = {"retrieval": _table(values.get("retrieval"), "retrieval", "head numbers")}
        if values.get("windows") is not None:
            tables["windows"] = _table(values["windows"], "windows", "tokens")
        return from_dict(cls, {**values, **tables}, where="the head map")

    def __str__(self) -> str:
        """The map as text: a line per layer, `R` retrieval, `l` local query head whose KV head is full, `.` local."""
        lines = []
        for layer, heads in enumerate(self.retrieval):
            if heads is None:
                lines.append(f"{layer:3d}  (left as it is)")
                continue
            full = self.full_kv_heads(layer)
            cells = ["R" if h in heads else "l" if h // self.group_size in full else "." for h in range(self.query_heads)]
            groups = ["".join(cells[g * self.group_size : (g + 1) * self.group_size]) for g in range(self.kv_heads)]
            lines.append(f"{layer:3d}  {' '.join(groups)}")
        lines.append(f"retrieval heads {self.ratio:.1%}, KV heads kept in full {self.full_kv_ratio:.1%}")
        if self.windows is not None:
            counts = [f"{n} of {window} tokens" for window, n in self.window_counts(0).items()]
            lines.append(f"windows of local KV heads: {', '.join(counts) or 'none'}")
        return "\n".join(lines)


def _table(rows: Any, name: str, what: str) -> tuple[tuple[int, ...] | None, ...]:
    """A JSON list with a list of numbers or null for each layer, as tuples."""
    if not isinstance(rows, list):
        raise ValueError(f"heads.{name} must be a list with one entry per layer, got {rows!r}.")
    for layer, row in enumerate(rows):
        numbers = row is None or (isinstance(row, list) and all(type(n) is int for n in row))
        _require(numbers, f"heads.{name}[{layer}]", f"a list of {what} or null", row)
    return tuple(None if row is None else tuple(row) for row in rows)
