"""CPU time and memory of this process and all its descendants (Linux only)."""

from __future__ import annotations

import os
from pathlib import Path

PROC = Path("/proc")


def tree() -> list[int]:
    """Process numbers of this process and its living descendants."""
    parents = {}
    for entry in os.listdir(PROC):
        if entry.isdigit() and (fields := _fields(int(entry))):
            parents[int(entry)] = int(fields[1])
    found = [os.getpid()]
    for number in found:  # grows while it is walked through
        found += [child for child, parent in parents.items() if parent == number]
    return found


def tree_cpu_seconds() -> float:
    """Of all processes of the tree, those that have ended (and were waited for) included."""
    ticks = sum(sum(map(int, fields[11:15])) for number in tree() if (fields := _fields(number)))
    return ticks / os.sysconf("SC_CLK_TCK")


def tree_memory() -> float:
    """Bytes: the sum of proportional set sizes, which counts a page that processes share once."""
    total = 0
    for number in tree():
        try:
            lines = (PROC / str(number) / "smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return float(total)


def _fields(number: int) -> list[str]:
    """Of a process's stat file, those after its name, which may hold blanks; none where it has ended meanwhile."""
    try:
        return (PROC / str(number) / "stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
