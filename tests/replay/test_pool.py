"""Several processes, and how they end."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.support.fake_replay import Variant
from tests.support.waiting import HUNG_S
from vllm_pd_scheduler.replay.job import Job, ReplayError
from vllm_pd_scheduler.replay.pool import run_all

Make = Callable[[bool], Job]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Nobody but the pool has ended its processes, and none is left."""
    waited_in_vain = threading.Event()

    def end_all() -> None:
        waited_in_vain.set()
        for process in multiprocessing.active_children():
            process.kill()

    timer = threading.Timer(HUNG_S, end_all)
    timer.start()
    yield
    timer.cancel()
    assert not waited_in_vain.is_set()
    assert not multiprocessing.active_children()


def silent(index: int, rate: float, finished: int) -> None:
    """For tests that do not look."""


def test_processes_give_what_one_gives(job: Make) -> None:
    variants = [Variant(name) for name in ("slow", "fast", "instant")]
    alone, together = [], []
    one = run_all(job(False), variants, 1, lambda *told: alone.append(told))
    two = run_all(job(False), variants, 2, lambda *told: together.append(told))
    assert one == two
    assert [outcome.run.strategy for outcome in two] == ["slow", "fast", "instant"]
    assert sorted(alone) == sorted(together)
    assert (2, 1.0, 11) in together


@pytest.mark.parametrize(
    ("name", "message"),
    [("odd", "odd: a prompt is longer"), ("dead", "dead: its process was killed; if memory")],
)
def test_one_that_fails_ends_all(job: Make, name: str, message: str) -> None:
    with pytest.raises(ReplayError, match=message):
        run_all(job(False), [Variant("stuck"), Variant(name)], 2, silent)


def test_an_interrupt_ends_all(job: Make) -> None:
    ended = threading.Event()

    def interrupt() -> None:
        while not ended.wait(0.5):  # Python drops one that comes while it collects garbage
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_all(job(False), [Variant("stuck"), Variant("stuck")], 2, silent)
    finally:
        ended.set()
        thread.join()
