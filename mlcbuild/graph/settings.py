"""What the command line decides for the whole process, light enough to be imported by every command."""

from __future__ import annotations

from dataclasses import dataclass

from mlcbuild.graph.action import Report


def ignore_report(text: str, fraction: float | None = None) -> None:
    """A Report for nobody."""


@dataclass
class Settings:
    """`always`: run even what is current or in the store. `report`: where the running step says how far it is."""

    always: bool = False
    report: Report = ignore_report


settings = Settings()
