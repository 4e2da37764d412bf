"""How commands speak on a console: sections, notes and tables, the same on a terminal and in a log file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from hooktuner.assemble import Assembled

LOG_WIDTH = 160
"""Columns where the output is not a terminal, so that tables in log files are not squeezed."""


class Reporter:
    """Writes to a console. `quiet` writes nothing (other processes of a distributed run, tests)."""

    def __init__(self, console: Console | None = None, *, stderr: bool = False, quiet: bool = False) -> None:
        self.console = console or Console(stderr=stderr, quiet=quiet)
        if not self.console.is_terminal:
            self.console.width = max(self.console.width, LOG_WIDTH)

    def section(self, title: str) -> None:
        """A heading."""
        self.console.print(Text(title, style="bold"))

    def line(self, sentence: str) -> None:
        """One sentence, never broken into lines and never read as markup."""
        self.console.print(Text(sentence), soft_wrap=True)

    def note(self, sentence: str) -> None:
        """Something that the user should know."""
        self.console.print(Text.assemble(("note ", "cyan"), sentence), soft_wrap=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table; without a header where all columns are nameless."""
        table = Table(box=None, pad_edge=False, header_style="bold", show_header=any(columns))
        for number, column in enumerate(columns):
            table.add_column(column, overflow="fold", no_wrap=number == 0)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self.console.print(table)


def report_plan(assembled: Assembled, reporter: Reporter) -> None:
    """What a checked config would train, and every note."""
    run, plugins = assembled.run, assembled.plugins
    config = run.config
    assert run.card is not None
    length = f"{config.max_train_steps} steps" if config.max_train_steps else f"{config.num_train_epochs} epochs"
    checkpoint = run.model_path or "built on this machine"
    techniques = ", ".join(plugin.name for plugin in plugins.plugins if plugin is not plugins.family) or "none"
    reporter.table(
        ("", ""),
        [
            ("model", f"{run.card.name} {run.flavour.name} ({checkpoint})"),
            ("training", f"{config.model_type}, {length}, learning rate {config.learning_rate:g}, seed {config.seed}"),
            ("data", config.data_backend_config or "none"),
            ("techniques", techniques),
            ("output", config.output_dir),
        ],
    )
    for sentence in run.notes:
        reporter.note(sentence)
