"""Progress with time left: a bar on a terminal, gone again when the work was short; a line every now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
QUIET_SECONDS = 10.0
"""Without a terminal: shortest time between two lines."""
SHORT_SECONDS = 2.0
"""On a terminal: the bar of work that took less does not stay."""


def track(items: Iterable[T], *, total: int, what: str, done: int = 0) -> Iterator[T]:
    """Yield from `items`, showing how far it is and how long it will still take.

    Args:
        total: length of the whole work; done: items finished before (a resumed run).
    """
    if sys.stderr.isatty():
        yield from _bar(items, total, what, done)
    else:
        yield from _lines(items, total, what, done)


def _bar(items: Iterable[T], total: int, what: str, done: int) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total, completed=done)
        for item in items:
            yield item
            progress.advance(task)
        progress.live.transient = (progress.tasks[task].elapsed or 0.0) < SHORT_SECONDS


def _lines(items: Iterable[T], total: int, what: str, done: int) -> Iterator[T]:
    start = shown = time.monotonic()
    for count, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        last = done + count == total
        if now - shown > QUIET_SECONDS or (last and now - start > QUIET_SECONDS):
            left = (now - start) / count * (total - done - count)
            sys.stderr.write(f"{what}: {done + count}/{total}, {now - start:.0f} s, about {left:.0f} s left\n")
            shown = now
