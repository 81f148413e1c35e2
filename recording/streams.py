"""Work that must be done in order per camera, spread over processes: a video is decoded once, front to back, in one.

Only small results travel between processes; pictures stay where they were decoded. The result does not depend on the
number of processes.
"""

from __future__ import annotations

import gc
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any

KEPT = 2**24  # bytes: blocks of memory up to this size stay with a process instead of going back and forth
AHEAD = 24  # steps by which a process may be ahead of the slowest: what is unfinished stays bounded
BLOCK = 6  # steps a lane takes before the next one has its turn: its decoder's frames are still in the cache


def run_streams(
    make: Callable[[int], Iterator[Any]],
    lanes: Sequence[int],
    steps: int,
    *,
    workers: int,
    costs: Sequence[float] | None = None,
) -> Iterator[tuple[int, int, Any]]:
    """Runs make(lane), an iterator of at least `steps` items, for every lane; yields (lane, step, item) as they come.

    Each lane's steps come in order. A lane lives in one of `workers` processes, in this one if workers is 1; `make` and
    the items must be picklable then. costs: of each lane, so that the processes have equally much to do. A ValueError
    or OSError in a lane is raised here.
    """
    if workers == 1 or len(lanes) < 2:
        streams = {lane: make(lane) for lane in lanes}
        try:
            for step in range(steps):
                for lane, stream in streams.items():
                    yield lane, step, next(stream)
        finally:
            for stream in streams.values():
                stream.close()
        return
    shares = _shares(lanes, costs or [1.0] * len(lanes), min(workers, len(lanes)))
    context = _context()
    pipes, processes = [], []
    try:
        for share in shares:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, make, share, steps))
            process.start()
            theirs.close()  # else its end would go unnoticed
            pipes.append(ours)
            processes.append(process)
        yield from _collect(pipes, steps)
        for process in processes:
            process.join()
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            if process.is_alive():
                process.terminate()
            process.join()


def _shares(lanes: Sequence[int], costs: Sequence[float], workers: int) -> list[list[int]]:
    """The lanes of each process: the dearest first, each to the process that has least to do."""
    shares, load = [[] for _ in range(workers)], [0.0] * workers
    for place in sorted(range(len(lanes)), key=lambda place: -costs[place]):
        least = load.index(min(load))
        shares[least].append(lanes[place])
        load[least] += costs[place]
    return shares


def _collect(pipes: list[Connection], steps: int) -> Iterator[tuple[int, int, Any]]:
    """What the processes send, a message a block; tells them how far they may go."""
    done = dict.fromkeys(range(len(pipes)), 0)
    allowed = 0
    while True:
        slowest = min(done.values())
        if slowest == steps:
            return
        if min(slowest + AHEAD, steps) > allowed:
            allowed = min(slowest + AHEAD, steps)
            for number, pipe in enumerate(pipes):
                if done[number] < steps:
                    pipe.send(allowed)
        open_pipes = [pipe for number, pipe in enumerate(pipes) if done[number] < steps]
        for pipe in wait(open_pipes):
            try:
                message = pipe.recv()
            except (EOFError, ConnectionResetError):
                raise RuntimeError(
                    "a worker process ended unexpectedly (was it killed for want of memory?); repeat the command to "
                    "continue, with fewer --workers"
                ) from None
            if isinstance(message, Exception):
                raise message
            done[pipes.index(pipe)] = message[-1][1] + 1  # its last step
            yield from message


def _work(pipe: Connection, make: Callable[[int], Iterator[Any]], lanes: list[int], steps: int) -> None:
    """A process: its lanes in turn, block by block. Ends when the main process is gone."""
    import cv2

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process says when to stop
    cv2.setNumThreads(1)
    if "torch" in sys.modules:  # imported with what is to be done, if at all
        sys.modules["torch"].set_num_threads(1)
    try:
        streams = [(lane, make(lane)) for lane in lanes]
        bytearray(KEPT)  # freed at once: glibc keeps what is freed up to the size of the largest block it saw freed
        gc.freeze()  # what is imported stays: collections need not look at it
        allowed = 0
        for first in range(0, steps, BLOCK):
            block = range(first, min(first + BLOCK, steps))
            while block.stop > allowed:
                allowed = pipe.recv()
            pipe.send([(lane, step, next(stream)) for lane, stream in streams for step in block])
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except (ValueError, OSError) as error:
        pipe.send(error)


def start_early() -> None:
    """Has the server of processes started beside other work, so that it is there when it is needed."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        _context()
        forkserver.ensure_running()


def _context():
    """Processes from a server that has imported the package once; plain spawning where the system has no such thing."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["recording.lanes", "cv2", "numba"])
    return context
