"""Streams of gateways: every message in every state, any order of them, and bodies however they are cut."""

import tracemalloc
import unittest
from collections.abc import Callable
from typing import Any, ClassVar

from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import ext_proc as fleet
from vllm_pd_scheduler.connectors import Splice
from vllm_pd_scheduler.envoy.ext_proc.messages import (
    PART_BYTES,
    decode,
    encode,
    encode_part,
    encode_streamed,
)
from vllm_pd_scheduler.envoy.ext_proc.stream import (
    AnswerBegins,
    Continue,
    Message,
    PassOn,
    Phase,
    Route,
    State,
    Stream,
    StreamedAnswer,
    StreamError,
    Wait,
)
from vllm_pd_scheduler.request.errors import reject
from vllm_pd_scheduler.routing.answer_head import AnswerHead

HEADERS = fleet.COMPLETION
FIRST = Message(Phase.REQUEST_HEADERS, headers=HEADERS, streamed=True, answer_streamed=True)
OK = AnswerHead(200)


class Case(unittest.TestCase):
    def setUp(self) -> None:
        self.router = fleet.build()

    def forward(self) -> Any:
        return fleet.forward(self.router)

    @property
    def in_flight(self) -> int:
        return fleet.in_flight(self.router)

    def in_state(self, state: State) -> Stream:
        """A gateway's stream that came to a state on the usual way."""
        stream = Stream()
        steps: list[Callable[[], object]] = [
            lambda: stream.receive(FIRST),
            lambda: stream.receive(Message(Phase.REQUEST_BODY, True, body=b"{}")),
            lambda: stream.routed(self.forward()),
            stream.sent,
            stream.close,
        ]
        for step in steps:
            if stream.state is state:
                break
            step()
        self.assertIs(stream.state, state)
        return stream


class ShortPartsTest(Case):
    def test_they_take_no_more_memory_than_is_accounted(self) -> None:
        """A client may send its body letter by letter."""
        stream = Stream()
        stream.receive(FIRST)
        sent = [(b"%d" % number) * (1 + 3 * (number % 1000 == 0)) for number in range(20_000)]
        sent[100] = b"x" * 70_000
        tracemalloc.start()
        try:
            for part in sent:
                stream.receive(Message(Phase.REQUEST_BODY, body=bytes(bytearray(part))))
            taken, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        self.assertLess(taken, 1.3 * stream.received)
        action = stream.receive(Message(Phase.REQUEST_BODY, True))
        assert isinstance(action, Route)
        self.assertEqual(action.take_body(), b"".join(sent))


class TableTest(Case):
    """What each message does in each state; where it cannot come, the stream ends."""

    # (state, message, end of stream): action and next state
    TABLE: ClassVar[dict[tuple[State, Phase, bool], tuple[type, State]]] = {
        (State.AWAIT_HEADERS, Phase.REQUEST_HEADERS, False): (Wait, State.AWAIT_BODY),
        (State.AWAIT_HEADERS, Phase.REQUEST_HEADERS, True): (Route, State.ROUTING),
        (State.AWAIT_BODY, Phase.REQUEST_BODY, False): (Wait, State.AWAIT_BODY),
        (State.AWAIT_BODY, Phase.REQUEST_BODY, True): (Route, State.ROUTING),
        **{(State.AWAIT_BODY, Phase.REQUEST_TRAILERS, end): (Route, State.ROUTING) for end in (False, True)},
        **{
            (state, phase, end): (Wait, state)  # the end, told once more
            for state in (State.ROUTING, State.ROUTED, State.FORWARDED)
            for phase in (Phase.REQUEST_BODY, Phase.REQUEST_TRAILERS)
            for end in (False, True)
        },
        **{
            (State.FORWARDED, phase, end): (action, State.FORWARDED)
            for phase, action in (
                (Phase.RESPONSE_HEADERS, AnswerBegins),
                (Phase.RESPONSE_BODY, PassOn),
                (Phase.RESPONSE_TRAILERS, Continue),
            )
            for end in (False, True)
        },
    }

    def test_every_pair(self) -> None:
        for state in State:
            for phase in Phase:
                for end in (False, True):
                    with self.subTest(state=state.name, phase=phase.name, end=end):
                        self.check(state, phase, end)

    def check(self, state: State, phase: Phase, end: bool) -> None:
        stream = self.in_state(state)
        held = self.in_flight
        expected = self.TABLE.get((state, phase, end))
        message = Message(phase, end, headers=HEADERS, body=b"{}", streamed=True, head=OK)
        if expected is None:
            with self.assertRaisesRegex(StreamError, f"^{phase.name} cannot come in state {state.name}$"):
                stream.receive(message)
            self.assertIs(stream.state, state)
        else:
            action = stream.receive(message)
            self.assertIs(type(action), expected[0])
            self.assertIs(stream.state, expected[1])
        self.assertEqual(self.in_flight, held)
        stream.close()
        self.assertEqual(self.in_flight, 0)

    def test_when_an_answer_is_complete(self) -> None:
        for phase, end, complete in (
            (Phase.REQUEST_BODY, True, False),
            (Phase.RESPONSE_HEADERS, False, False),
            (Phase.RESPONSE_HEADERS, True, True),
            (Phase.RESPONSE_BODY, False, False),
            (Phase.RESPONSE_BODY, True, True),
            (Phase.RESPONSE_TRAILERS, False, True),
        ):
            with self.subTest(phase=phase.name, end=end):
                stream = self.in_state(State.FORWARDED)
                stream.receive(Message(phase, end, head=OK))
                self.assertIs(stream.complete, complete)

    def test_an_error_can_be_answered_in_every_state(self) -> None:
        for state in (State.AWAIT_BODY, State.ROUTING, State.FORWARDED):
            with self.subTest(state=state.name):
                stream = self.in_state(state)
                answer = stream.refused(reject(413, "no", "too_large"))
                self.assertIs(stream.state, State.CLOSED)
                response = pb.ProcessingResponse.FromString(b"".join(encode(answer)))
                self.assertEqual(response.immediate_response.status.code, 413)


PIECES = st.lists(st.binary(max_size=50), max_size=8)


class AnyOrderTest(Case):
    MESSAGES = st.builds(
        Message,
        st.sampled_from(Phase),
        st.booleans(),
        headers=st.just(HEADERS),
        body=st.binary(max_size=9),
        streamed=st.just(True),
        answer_streamed=st.booleans(),
        head=st.just(OK),
    )
    STEPS = st.lists(
        st.one_of(MESSAGES, st.sampled_from(["routed", "rejected", "sent", "refused"])), max_size=12
    )

    @settings(max_examples=400, deadline=None)
    @given(STEPS)
    def test_nothing_but_a_stream_error_and_nothing_is_left(self, steps: list[Any]) -> None:
        stream = Stream()
        for step in steps:
            try:
                if isinstance(step, Message):
                    stream.receive(step)
                elif step == "routed":
                    stream.routed(self.forward())
                elif step == "rejected":
                    stream.routed(reject(503, "none", "no_decode"))
                elif step == "sent":
                    stream.sent()
                elif stream.state is not State.AWAIT_HEADERS:
                    stream.refused(reject(413, "no", "too_large"))
            except StreamError:
                break
        stream.close()
        self.assertEqual(self.in_flight, 0)

    @settings(max_examples=200, deadline=None)
    @given(PIECES, st.sampled_from(["with the last", "alone", "trailers"]), st.integers(0, 3))
    def test_a_body_is_what_its_parts_are(self, pieces: list[bytes], ends: str, again: int) -> None:
        stream, whole = Stream(), b"".join(pieces)
        self.assertEqual(stream.receive(FIRST), Wait())
        action: Any = Wait()
        for number, piece in enumerate(pieces):
            last = ends == "with the last" and number == len(pieces) - 1
            self.assertEqual(action, Wait())
            action = stream.receive(Message(Phase.REQUEST_BODY, last, body=piece))
        if not isinstance(action, Route):
            phase = Phase.REQUEST_TRAILERS if ends == "trailers" else Phase.REQUEST_BODY
            action = stream.receive(Message(phase, True))
        assert isinstance(action, Route)
        self.assertEqual(action.headers, HEADERS)
        self.assertEqual(stream.received, len(whole))
        for _ in range(again):
            self.assertEqual(stream.receive(Message(Phase.REQUEST_BODY, True, body=b"again")), Wait())
        self.assertEqual(stream.kept(action.take_body()), whole)
        self.assertEqual(action.take_body(), b"", "it is let go of")
        answer = stream.routed(self.forward())
        assert isinstance(answer, StreamedAnswer)
        self.assertEqual((answer.body, answer.trailers), (whole, ends == "trailers"))
        stream.close()


def parsed(messages: Any) -> list[pb.ProcessingResponse]:
    return [pb.ProcessingResponse.FromString(b"".join(parts)) for parts in messages]


class WrittenTest(Case):
    """What goes back to a gateway, read as that reads it."""

    def written(
        self, body: bytes | None, splice: Splice | None = None, trailers: bool = False
    ) -> tuple[pb.ProcessingResponse, list[pb.ProcessingResponse]]:
        forward = self.forward()
        forward.splice = splice
        first, *rest = parsed(encode_streamed(StreamedAnswer(forward, body, trailers)))
        return first, rest

    @settings(max_examples=60, deadline=None)
    @given(
        st.integers(0, 4 * PART_BYTES),
        st.one_of(st.none(), st.tuples(st.floats(0, 1), st.integers(1, 2 * PART_BYTES))),
        st.booleans(),
    )
    def test_a_body_of_any_size(self, size: int, splice: tuple[float, int] | None, trailers: bool) -> None:
        body = (b"0123456789" * (size // 10 + 1))[:size]
        expected, spliced = body, None
        if splice is not None:
            spliced = Splice(int(size * splice[0]), b"h" * splice[1])
            expected = spliced.into(body)
        _, rest = self.written(body, spliced, trailers)
        if trailers:
            self.assertEqual(rest.pop().WhichOneof("response"), "request_trailers")
        parts = [each.request_body.response.body_mutation.streamed_response for each in rest]
        self.assertEqual(b"".join(part.body for part in parts), expected)
        self.assertLessEqual(max(len(part.body) for part in parts), PART_BYTES)
        self.assertEqual([part.end_of_stream for part in parts], [False] * (len(parts) - 1) + [not trailers])
        self.assertEqual(len(parts), max(1, -(-len(expected) // PART_BYTES)), "no more than it takes")

    def test_a_request_without_a_body(self) -> None:
        first, rest = self.written(None)
        self.assertEqual(rest, [])
        self.assertEqual(first.WhichOneof("response"), "request_headers")

    def test_the_headers(self) -> None:
        own = {"x-pd-id": "mine", "x-data-parallel-rank": "1"}
        forward = fleet.forward(self.router, {**fleet.MODELS, **own})
        for fallbacks, expected in ((True, "10.0.0.1:80,10.0.0.1:81"), (False, "10.0.0.1:80")):
            forward.for_gateway(fallbacks)
            (message,) = parsed(encode_streamed(StreamedAnswer(forward, None, False)))
            common = message.request_headers.response
            self.assertTrue(common.clear_route_cache)
            found = {each.header.key: each.header.raw_value for each in common.header_mutation.set_headers}
            self.assertEqual(found, {"x-gateway-destination-endpoint": expected.encode()})
            self.assertEqual(list(common.header_mutation.remove_headers), ["x-pd-id", "x-data-parallel-rank"])
            told = message.dynamic_metadata["envoy.lb"]["x-gateway-destination-endpoint"]  # type: ignore[index]
            self.assertEqual(told, expected)

    def test_with_a_hand_off_there_is_one_destination(self) -> None:
        forward = fleet.forward(self.router, fleet.COMPLETION, b'{"prompt": "p"}')
        self.assertIsNotNone(forward.pending)
        forward.for_gateway(True)
        first, *_ = parsed(encode_streamed(StreamedAnswer(forward, b"{}", False)))
        mutation = first.request_headers.response.header_mutation
        found = {each.header.key: each.header.raw_value for each in mutation.set_headers}
        self.assertEqual(
            found, {"x-gateway-destination-endpoint": b"10.0.0.1:80", "x-envoy-max-retries": b"0"}
        )

    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 3 * PART_BYTES), st.booleans())
    def test_a_part_of_an_answer(self, size: int, last: bool) -> None:
        request = pb.ProcessingRequest()
        request.response_body.body, request.response_body.end_of_stream = b"x" * size, last
        message = decode(request.SerializeToString())
        self.assertEqual(
            (message.phase, len(message.body), message.end_of_stream), (Phase.RESPONSE_BODY, size, last)
        )
        rest = parsed(encode_part(PassOn(message.body, message.end_of_stream)))
        parts = [each.response_body.response.body_mutation.streamed_response for each in rest]
        self.assertEqual(b"".join(part.body for part in parts), b"x" * size)
        self.assertEqual([part.end_of_stream for part in parts], [False] * (len(parts) - 1) + [last])
        self.assertLessEqual(max(len(part.body) for part in parts), PART_BYTES)


if __name__ == "__main__":
    unittest.main()
