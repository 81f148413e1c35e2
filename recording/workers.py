"""Work that must be done in order per lane (a camera's video), with the lanes spread over processes.

A video is decoded once, front to back, in one process. Only small results travel between processes; images stay where
they were decoded. The result does not depend on the number of processes.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from heapq import heappop, heappush
from multiprocessing import forkserver
from typing import Any

from multiview.run import STOP_SIGNALS

KEPT = 2**24  # bytes: blocks of memory up to this size stay with a process instead of going back and forth
BLOCK = 6  # steps a lane takes before the next one has its turn: its decoder's frames are still in the cache
AHEAD = 4  # blocks by which a process may be ahead of the slowest: what is unfinished stays bounded
PRELOADED = ["recording.rectify", "recording.masks", "cv2", "numba"]

_lanes: dict[int, Iterator[Any]] = {}  # of this worker process


def run_lanes(
    make: Callable[[int], Iterator[Any]], lanes: Sequence[int], steps: int, *, workers: int,
    costs: Sequence[float] | None = None,
) -> Iterator[tuple[int, int, Any]]:  # fmt: skip
    """Runs make(lane), an iterator of at least `steps` items, for every lane; yields (lane, step, item) as they come.

    Each lane's steps come in order. A lane lives in one of `workers` processes, in this one if workers is 1; `make` and
    the items must be picklable then. costs: of each lane, so that the processes have equally much to do. What a lane
    raises is raised here.
    """
    if workers == 1 or len(lanes) < 2:
        with ExitStack() as stack:
            streams = {lane: stack.enter_context(closing(make(lane))) for lane in lanes}
            for step in range(steps):
                for lane, stream in streams.items():
                    yield lane, step, next(stream)
        return
    parts = [(0.0, number, []) for number in range(min(workers, len(lanes)))]  # load, number, lanes
    for cost, lane in sorted(zip(costs or [1.0] * len(lanes), lanes), reverse=True):  # the dearest first
        load, number, part = heappop(parts)
        heappush(parts, (load + cost, number, [*part, lane]))
    # One pool per process: a lane's decoder is in one process, so its steps must go there.
    pools = [ProcessPoolExecutor(1, start_server(), _start, (make, part)) for _, _, part in parts]
    blocks = [range(first, min(first + BLOCK, steps)) for first in range(0, steps, BLOCK)]
    begun, done = [0] * len(pools), [0] * len(pools)  # blocks of each process
    pending: dict[Future, int] = {}
    try:
        while min(done) < len(blocks):
            for number, pool in enumerate(pools):
                while begun[number] < min(min(done) + AHEAD, len(blocks)):
                    pending[pool.submit(_advance, blocks[begun[number]])] = number
                    begun[number] += 1
            finished = wait(pending, return_when=FIRST_COMPLETED).done
            for future in [future for future in pending if future in finished]:  # as submitted: lanes stay in order
                done[pending.pop(future)] += 1
                yield from future.result()
    except BrokenProcessPool:
        ended = "a worker process ended unexpectedly (was it killed for want of memory?)"
        raise ChildProcessError(f"{ended}; repeat the command to continue, with fewer --workers") from None
    finally:
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in pools:
            pool.shutdown()


def start_server():
    """Starts the server that has imported the package once and makes the processes; returns its context."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    if threading.current_thread() is threading.main_thread():
        # The server and its children inherit that they ignore what a cluster or a closed terminal sends to all.
        before = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
        forkserver.ensure_running()
        for number, handler in before.items():
            signal.signal(number, handler)
    return context


def _start(make: Callable[[int], Iterator[Any]], lanes: list[int]) -> None:
    """Prepares a worker process."""
    import cv2

    for number in (signal.SIGINT, *STOP_SIGNALS):  # the main process says when to stop
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_main_process, daemon=True).start()
    cv2.setNumThreads(1)
    if "torch" in sys.modules:  # imported with what is to be done, if at all
        sys.modules["torch"].set_num_threads(1)
    _lanes.update((lane, make(lane)) for lane in lanes)
    bytearray(KEPT)  # freed at once: glibc keeps what is freed up to the size of the largest block it saw freed
    gc.freeze()  # what is imported stays: collections need not look at it


def _end_with_main_process() -> None:
    """A killed main process must not leave workers behind: they would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _advance(steps: range) -> list[tuple[int, int, Any]]:
    return [(lane, step, next(stream)) for lane, stream in _lanes.items() for step in steps]
