"""Progress of a study in the terminal: a bar a part, with the time left."""

from __future__ import annotations

from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from grace.study.execution import Progress as StudyProgress


class TerminalProgress(StudyProgress):
    """Bars of what runs, one of the whole study under them.

    Args:
        units: units of work of the whole study, in training steps; what is left is told from it.
    """

    def __init__(self, units: int) -> None:
        columns = (
            TextColumn("{task.description:<16}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.bars = Progress(*columns, transient=False)
        self.whole = self.bars.add_task("study", total=units)
        self.parts: dict[str, Any] = {}
        self.done: dict[str, int] = {}
        self.totals: dict[str, int] = {}

    def __enter__(self) -> TerminalProgress:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def start(self, name: str, total: int) -> None:
        """Remember a part; its bar comes with its first step."""
        self.totals[name] = total

    def advance(self, name: str, done: int) -> None:
        """Show the part at `done`."""
        if done and name not in self.parts:
            self.parts[name] = self.bars.add_task(name, total=self.totals[name])
        if name in self.parts:
            self.bars.update(self.parts[name], completed=done)
        if name in _PREPARATION or name.startswith("draw "):
            return
        self.bars.advance(self.whole, done - self.done.get(name, 0))
        self.done[name] = done

    def finish(self, name: str) -> None:
        """Take the part's bar away."""
        self.advance(name, self.totals[name])
        if name in self.parts:
            self.bars.remove_task(self.parts.pop(name))


_PREPARATION = ("draw", "look", "teacher", "student")  # not counted in training steps
