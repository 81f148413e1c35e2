"""How much memory this process holds and held at most, as the kernel counts it (Linux only)."""

from __future__ import annotations

from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_HIGH_WATER = "5"  # proc(5), clear_refs


def reset_peak() -> bool:
    """Lets `peak_bytes` begin anew; False where this system does not allow it."""
    try:
        CLEAR.write_text(RESET_HIGH_WATER)
    except OSError:  # no /proc, or one that is not to be written to
        return False
    return True


def peak_bytes() -> float:
    """The most that the process held since `reset_peak`, libraries and all."""
    return _status("VmHWM")


def resident_bytes() -> float:
    """What the process holds."""
    return _status("VmRSS")


def _status(name: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return 1024.0 * int(line.split()[1])
