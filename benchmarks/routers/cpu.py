"""What a process and all its descendants have used, by the kernel's account (``/proc``)."""

import contextlib
from collections.abc import Iterator

import psutil


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process, its threads and its descendants, in user and kernel mode.

    It counts children that have ended, too. The kernel's account is exact; it is shown in steps of 10 ms.
    """
    total = 0.0
    for process in _tree(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def resident_mb(pid: int) -> float:
    """Return the resident memory (RSS) of a process and its descendants, in 10⁶ bytes."""
    total = 0
    for process in _tree(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total / 1e6


def end(pid: int, patience_s: float) -> None:
    """End a process by SIGTERM, and what is left of it and its descendants after a while by SIGKILL."""
    tree = list(_tree(pid))
    if tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            tree[0].terminate()
    _, alive = psutil.wait_procs(tree, patience_s)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, patience_s)


def _tree(pid: int) -> Iterator[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        yield process
        yield from process.children(recursive=True)
