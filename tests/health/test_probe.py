"""What an instance answers is data: nonsense is that instance's failure, no exception and no hang of ours."""

import asyncio
import errno
import logging
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.waiting import until
from vllm_pd_scheduler.fleet.condition import reason
from vllm_pd_scheduler.instance_http.session import open_session
from vllm_pd_scheduler.instance_http.shortage import is_our_shortage
from vllm_pd_scheduler.models import InstanceRole, InstanceState

from .instances import Fixture, raw_answer

HEALTHY, UNHEALTHY = InstanceState.HEALTHY, InstanceState.UNHEALTHY
PAGE = b"vllm:num_requests_running 3\nvllm:num_requests_waiting 2\nvllm:kv_cache_usage_perc 0.5\n"
NINES = b"9" * 400


def cache(*labels: bytes) -> bytes:
    return PAGE + b"vllm:cache_config_info{%s} 1.0\n" % b",".join(labels)


BAD_PAGES = {
    "a number of requests beyond all floats": b"vllm:num_requests_running " + NINES,
    "infinitely many requests": b"vllm:num_requests_running 1e999",
    "more requests than any engine has": b"vllm:num_requests_running 1e200",
    "less than none": b"vllm:num_requests_running -1",
    "no number": b"vllm:num_requests_running NaN",
    "no number of an engine": PAGE + b'vllm:num_requests_running{engine="1"} NaN',
    "more that wait than any engine has": PAGE + b'vllm:num_requests_waiting{engine="7"} 1e7',
    "no text": b"\xff\xfe\x00" * 100,
    "another page": b"<html>",
    "nothing": b"",
    "a label without end": b'vllm:num_requests_running{engine="' + b"x" * 100_000,
    "a page of engines": b"".join(b'vllm:num_requests_running{engine="%d"} 1\n' % n for n in range(5000)),
    "a page of nothing": b"\n" * 200_000,
    "a large page": PAGE + b"# " + b"x" * (5 << 20),
}
BAD_ANSWERS = {
    "compressed": raw_answer(PAGE, b"content-encoding: gzip\r\n"),
    "compressed in two ways": raw_answer(PAGE, b"content-encoding: deflate, br\r\n"),
    "cut": raw_answer(PAGE, length=1000),
    "a length that is none": raw_answer(PAGE, b"content-length: -1\r\n"),
    "a length beyond all numbers": b"HTTP/1.1 200 OK\r\ncontent-length: %s\r\n\r\n%s" % (NINES, PAGE),
    "chunks that are none": raw_answer(b"zz\r\n" + PAGE, b"transfer-encoding: chunked\r\n"),
    "a chunk beyond all numbers": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%s\r\nx"
    % (b"f" * 400),
    "a long header": raw_answer(PAGE, b"x-long: " + b"x" * 1_000_000 + b"\r\n"),
    "many headers": raw_answer(PAGE, b"".join(b"x-%d: x\r\n" % n for n in range(100_000))),
    "no HTTP": b"220 mail.example.com ESMTP\r\n",
    "another HTTP": b"HTTP/9.9 200 OK\r\n\r\n",
    "a status that is none": b"HTTP/1.1 2000 OK\r\n\r\n",
    "elsewhere": raw_answer(status=b"302 Found", headers=b"location: http://127.0.0.1:9/metrics\r\n"),
    "a redirect to nowhere": raw_answer(status=b"302 Found", headers=b"location: http://[::bad\r\n"),
    "nothing": b"",
}


@contextmanager
def no_file_descriptors() -> Iterator[None]:
    """Let this process open nothing more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class TestMetrics:
    @pytest.mark.parametrize("page", BAD_PAGES.values(), ids=BAD_PAGES)
    async def test_a_bad_page(self, fleet: Fixture, page: bytes, caplog: pytest.LogCaptureFixture) -> None:
        await self.fails(fleet, raw_answer(page), caplog)

    @pytest.mark.parametrize("answer", BAD_ANSWERS.values(), ids=BAD_ANSWERS)
    async def test_a_bad_answer(
        self, fleet: Fixture, answer: bytes, caplog: pytest.LogCaptureFixture
    ) -> None:
        await self.fails(fleet, answer, caplog)

    async def fails(self, fleet: Fixture, answer: bytes, caplog: pytest.LogCaptureFixture) -> None:
        """Of both, only the one with the bad answer has no metrics, which is said once; both serve."""
        await fleet.serve("good")
        await fleet.serve_raw("bad", {"/health": raw_answer(), "/metrics": answer})
        monitor = fleet.monitor()
        await monitor.start()
        await until(lambda: fleet.failed_scrapes("bad") >= 3)
        assert [fleet[name].state for name in ("good", "bad")] == [HEALTHY, HEALTHY]
        assert fleet["good"].metrics is not None
        assert fleet["bad"].metrics is None
        assert not [record for record in caplog.records if record.exc_info]
        said = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
        assert len(said) == 1, said
        assert said[0].startswith("bad: its load is not known: ")
        assert len(said[0]) < 400

    @pytest.mark.parametrize(
        "headers",
        [
            b"",
            b"content-type: text/plain; charset=klingon\r\n",
            b"content-type: \xff\r\n",
            b"content-encoding: \r\n",
        ],
    )
    async def test_what_it_calls_its_page_does_not_matter(self, fleet: Fixture, headers: bytes) -> None:
        await fleet.serve_raw("d0", {"/health": raw_answer(), "/metrics": raw_answer(PAGE, headers)})
        await fleet.monitor().check(fleet["d0"])
        assert fleet["d0"].metrics is not None

    @pytest.mark.parametrize("endless", [b"# and so on\n" * 1000, b"x" * 65536, b"\n" * 65536])
    async def test_a_page_without_end(self, fleet: Fixture, endless: bytes) -> None:
        headers = b"HTTP/1.1 200 OK\r\n\r\n"
        await fleet.serve_raw("d0", {"/metrics": headers + PAGE}, endless)
        await fleet.monitor().check(fleet["d0"])
        assert fleet.failed_scrapes("d0") == 1
        assert fleet["d0"].metrics is None

    async def test_a_page_that_comes_slowly(self, fleet: Fixture) -> None:
        await fleet.serve_raw(
            "d0", {"/health": raw_answer()}, slow={"/metrics": raw_answer(PAGE, length=1000)}
        )
        await fleet.monitor(timeout=0.3).check(fleet["d0"])
        assert (fleet["d0"].state, fleet["d0"].metrics) == (HEALTHY, None)

    async def test_a_large_page_is_parsed_in_a_thread(
        self, fleet: Fixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        threads = []
        to_thread = asyncio.to_thread
        monkeypatch.setattr(asyncio, "to_thread", lambda *args: (threads.append(args), to_thread(*args))[1])
        large = PAGE + b"# a comment of a page that is large\n" * 20_000
        await fleet.serve_raw("d0", {"/health": raw_answer(), "/metrics": raw_answer(large)})
        await fleet.monitor().check(fleet["d0"])
        assert fleet["d0"].metrics is not None
        assert len(threads) == 1

    async def test_a_load_that_is_not_told_any_more_is_forgotten(self, fleet: Fixture) -> None:
        """Else an instance that said "busy" in its last page would never get a request again."""
        server = await fleet.serve()
        monitor = fleet.monitor()
        await monitor.check(fleet["d0"])
        server.page_status = 500
        fleet.now += 29.0
        await monitor.check(fleet["d0"])
        assert fleet["d0"].waiting == 2.0
        fleet.now += 2.0
        await monitor.check(fleet["d0"])
        assert (fleet["d0"].metrics, fleet["d0"].waiting, fleet["d0"].scraped_at) == (None, 0.0, 10.0)
        server.page_status = 200
        await monitor.check(fleet["d0"])
        assert (fleet["d0"].waiting, fleet["d0"].scraped_at) == (2.0, 41.0)


class TestHealth:
    @pytest.mark.parametrize("answer", BAD_ANSWERS.values(), ids=BAD_ANSWERS)
    async def test_a_bad_answer(self, fleet: Fixture, answer: bytes) -> None:
        await fleet.serve_raw("d0", {"/health": answer, "/metrics": raw_answer(PAGE)})
        await fleet.monitor().start()
        assert fleet["d0"].state is (HEALTHY if b"content-encoding" in answer else UNHEALTHY)
        assert len(reason(fleet["d0"])) <= 300

    async def test_a_body_without_end(self, fleet: Fixture) -> None:
        await fleet.serve_raw("d0", {"/health": b"HTTP/1.1 200 OK\r\n\r\n"}, b"x" * 65536)
        await fleet.monitor().check(fleet["d0"])
        assert fleet["d0"].state is UNHEALTHY
        assert reason(fleet["d0"]) == "/health gives no answer that can be used: it has more than 65536 bytes"

    async def test_nobody_listens(self, fleet: Fixture) -> None:
        await fleet.serve_raw("d0", {})
        fleet.raw_servers[0].close()
        await fleet.monitor().check(fleet["d0"])
        assert reason(fleet["d0"]) == "/health cannot be reached: Connection refused"


class TestModels:
    @pytest.mark.parametrize("answer", BAD_ANSWERS.values(), ids=BAD_ANSWERS)
    async def test_a_bad_answer(self, fleet: Fixture, answer: bytes) -> None:
        answers = {"/health": raw_answer(), "/metrics": raw_answer(PAGE), "/v1/models": answer}
        await fleet.serve_raw("d0", answers)
        await fleet.monitor().start()
        assert (fleet["d0"].state, fleet["d0"].models.names) == (HEALTHY, None)
        assert fleet["d0"].metrics is not None

    async def test_a_list_without_end(self, fleet: Fixture) -> None:
        answers = {"/v1/models": b'HTTP/1.1 200 OK\r\n\r\n{"data": ['}
        await fleet.serve_raw("d0", answers | {"/health": raw_answer()}, b'{"id": "a"},' * 5000)
        await fleet.monitor(timeout=2.0).check(fleet["d0"])
        assert fleet["d0"].models.names is None


class TestOurOwnFaults:
    """What this process lacks, or does too late, is no failure of an instance."""

    def test_which_errors_are_ours(self) -> None:
        ours = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
        assert all(is_our_shortage(OSError(number, "")) for number in ours)
        assert is_our_shortage(MemoryError())
        theirs = (
            errno.ECONNREFUSED,
            errno.ECONNRESET,
            errno.EHOSTUNREACH,
            errno.ENETUNREACH,
            errno.ETIMEDOUT,
            errno.EADDRNOTAVAIL,
        )
        assert not any(is_our_shortage(OSError(number, "")) for number in theirs)
        assert not is_our_shortage(TimeoutError())
        assert not is_our_shortage(ValueError())

    async def test_without_file_descriptors_instances_stay_as_they_are(
        self, fleet: Fixture, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "vllm_pd_scheduler")
        for name in ("known", "new"):
            await fleet.serve(name)
        await fleet.monitor().check(fleet["known"])
        async with open_session() as fleet.session:  # which has no connection open that it could use
            monitor = fleet.monitor()
            with no_file_descriptors():
                for _ in range(3):
                    for name in ("known", "new"):
                        await monitor.check(fleet[name])
            assert [fleet[name].state for name in ("known", "new")] == [HEALTHY, InstanceState.STARTING]
            said = [record.message for record in caplog.records if "Too many open files" in record.message]
            assert len(said) == 2, said
            await monitor.check(fleet["new"])
        assert fleet["new"].state is HEALTHY

    async def test_a_loop_that_stood_still_makes_nobody_late(self, fleet: Fixture) -> None:
        for name in ("d0", "d1"):
            await fleet.serve(name)
        timeout = 1.0
        check = asyncio.ensure_future(fleet.monitor(timeout=timeout).check_all())
        await asyncio.sleep(0)
        time.sleep(1.2 * timeout)  # noqa: ASYNC251 - as a strategy may, that reads a file
        await check
        assert len(fleet.registry.routable(InstanceRole.DECODE)) == 2
