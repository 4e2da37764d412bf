"""Progress bars: how far, how many, how long still. Nothing is drawn without a console. And how one stops midway."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar

from hooktuner.errors import HooktunerError

if TYPE_CHECKING:
    from rich.console import Console

Item = TypeVar("Item")


class PreparationStopped(HooktunerError):
    """The user interrupted indexing or caching. What was done is kept; the same command goes on from there."""

    exit_code = 130

    def __init__(self, what: str, done: int, total: int) -> None:
        super().__init__(f"{what} — interrupted after {done} of {total}. What is done is kept: run it again to go on.")


class Advance(Protocol):
    """Says that `count` more items are done."""

    def __call__(self, count: int = 1) -> None: ...


@contextmanager
def progress_bar(label: str, total: int, console: Console | None) -> Iterator[Advance]:
    """A bar with counts, elapsed time and ETA for the duration of the block."""
    if console is None or total == 0:
        yield lambda count=1: None
        return
    from rich import progress as rich_progress

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TextColumn("ETA"),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=total)
        yield lambda count=1: progress.advance(task, count)


def progress_over(items: Iterable[Item], *, total: int, label: str, console: Console | None) -> Iterator[Item]:
    """`items`, counted on a bar as they come."""
    with progress_bar(label, total, console) as advance:
        for item in items:
            yield item
            advance()
