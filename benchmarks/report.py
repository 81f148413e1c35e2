"""Tables of measurements: the same records as Markdown for people and as JSON for programs."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.timing import Timing, quartiles

CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Table:
    """records: one dict per row, the same columns in each; values: str, int, float, Timing, or None (not measured)."""

    title: str
    records: list[dict]
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """Times as `median (first-third quartile)` in milliseconds."""
        columns = list(self.records[0])
        lines = [f"## {self.title}", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        for record in self.records:
            lines.append("| " + " | ".join(format_cell(record[column]) for column in columns) + " |")
        return "\n".join(lines + [""] + [f"{note}\n" for note in self.notes])

    def to_dict(self) -> dict:
        records = [
            {column: value.to_dict() if isinstance(value, Timing) else value for column, value in record.items()}
            for record in self.records
        ]
        return {"title": self.title, "records": records, "notes": self.notes}


def format_cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, Timing):
        low, high = (1e3 * x for x in quartiles(value.seconds))
        return f"{format_number(1e3 * value.median)} ({format_number(low)}-{format_number(high)})"
    return format_number(value) if isinstance(value, float) else str(value)


def format_number(value: float) -> str:
    """Three significant digits, no exponent."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}"


def describe_machine(device: torch.device) -> dict:
    """What a figure means nothing without."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU: {cpu_name()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def cpu_name() -> str:
    if CPU_INFO.is_file():
        names = [line.split(":", 1)[1].strip() for line in CPU_INFO.read_text().splitlines() if "model name" in line]
        if names:
            return names[0]
    return platform.processor() or platform.machine()
