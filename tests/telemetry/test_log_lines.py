"""How a log line looks, and that it tells which request it is about."""

import asyncio
import io
import json
import logging
import re
from datetime import UTC, datetime
from typing import Any
from unittest import mock

from tests.support.routing import BODY, Case
from vllm_pd_scheduler.telemetry import log_lines

log = logging.getLogger("vllm_pd_scheduler.some.room")


class Written:
    """What is logged, in a format."""

    def __init__(self, kind: log_lines.LogFormat) -> None:
        self._out = io.StringIO()
        self.handler = logging.StreamHandler(self._out)
        self.handler.setFormatter(log_lines.formatter(kind))
        self._root = logging.getLogger()
        self._level = self._root.level

    def __enter__(self) -> "Written":
        self._root.addHandler(self.handler)
        return self

    def __exit__(self, *_: object) -> None:
        self._root.removeHandler(self.handler)
        self._root.setLevel(self._level)

    @property
    def lines(self) -> list[str]:
        return self._out.getvalue().splitlines()

    @property
    def objects(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]


class TestText:
    def test_a_line(self) -> None:
        with Written("text") as written:
            log.warning("%s is unhealthy", "d0")
        (line,) = written.lines
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \S+ WARNING vllm_pd_scheduler.some.room: d0 is unhealthy", line)

    def test_of_a_request(self) -> None:
        token = log_lines.request_id.set("id-1")
        with Written("text") as written:
            try:
                raise RuntimeError("odd")
            except RuntimeError:
                log.exception("it failed")
        log_lines.request_id.reset(token)
        assert written.lines[0].endswith("room: it failed [request id-1]")
        assert written.lines[-1] == "RuntimeError: odd"


class TestJson:
    def test_a_line(self) -> None:
        before = datetime.now(UTC)
        # Not logged: pytest keeps what is, and cannot report a lone surrogate.
        name, text = "vllm_pd_scheduler.some.room", '%s is\n"unhealthy" \ud800'
        record = logging.LogRecord(name, logging.WARNING, __file__, 1, text, ("d0",), None)
        found = json.loads(log_lines.formatter("json").format(record))
        assert datetime.fromisoformat(found.pop("time")).timestamp() >= before.timestamp() - 0.001
        assert found == {
            "level": "WARNING",
            "logger": "vllm_pd_scheduler.some.room",
            "message": 'd0 is\n"unhealthy" \ud800',
        }

    def test_of_a_request_that_failed(self) -> None:
        token = log_lines.request_id.set("id-1")
        with Written("json") as written:
            try:
                raise RuntimeError("odd")
            except RuntimeError:
                log.exception("it failed")
        log_lines.request_id.reset(token)
        (found,) = written.objects
        assert (found["message"], found["request_id"]) == ("it failed", "id-1")
        assert found["exception"].endswith("RuntimeError: odd")


class RequestTest(Case):
    """Lines about requests, as the request path writes them."""

    async def test_one_debug_line_tells_the_decision(self) -> None:
        with Written("json") as written:
            logging.getLogger().setLevel(logging.DEBUG)
            forward = await asyncio.create_task(self.route(x_request_id="id-1"))
            await asyncio.create_task(self.route({"prompt": "secret text", "n": 2}, x_request_id="id-2"))
            await asyncio.create_task(self.route(b"{secret text", x_request_id="id-3"))
        found = [
            (line["request_id"], line["level"], line["message"])
            for line in written.objects
            if line["logger"] == "vllm_pd_scheduler.routing.core"
        ]
        first, second, third = found
        split = f"/v1/completions: split, P p0, D d0, then d1, then d2; x-pd-id {forward.id}"
        self.assertEqual(first, ("id-1", "DEBUG", split))
        self.assertEqual(second[:2], ("id-2", "DEBUG"))
        self.assertRegex(second[2], r"^/v1/completions: whole, D d\d, .*; x-pd-id ")
        self.assertEqual(third, ("id-3", "DEBUG", "/v1/completions: refused with 400, bad_body"))
        for text in ("secret text", BODY["prompt"], "kv_transfer"):
            self.assertNotIn(text, "".join(written.lines))

    async def test_above_debug_nothing_is_made(self) -> None:
        with Written("text") as written:
            logging.getLogger().setLevel(logging.INFO)
            with mock.patch("vllm_pd_scheduler.routing.forward.Forward.__str__") as made:
                await self.route()
        self.assertEqual((written.lines, made.called), ([], False))

    async def test_a_strategy_that_fails_is_told_with_the_request(self) -> None:
        rank = "vllm_pd_scheduler.strategies.RoundRobin.rank"
        with Written("json") as written, mock.patch(rank, side_effect=RuntimeError("odd")):
            await asyncio.create_task(self.route(x_request_id="id-1"))
        found = {line.get("request_id") for line in written.objects if "odd" in line["message"]}
        self.assertEqual(found, {"id-1"})

    async def test_an_id_without_end_is_cut(self) -> None:
        with Written("json") as written:
            logging.getLogger().setLevel(logging.DEBUG)
            await asyncio.create_task(self.route(x_request_id="x" * 10_000))
        self.assertEqual({line["request_id"] for line in written.objects}, {"x" * 128})
