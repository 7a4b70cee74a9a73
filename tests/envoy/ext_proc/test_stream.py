"""The stream state machine: every message in every state."""

import unittest
from collections.abc import Callable
from typing import Any, ClassVar

from tests.support import ext_proc as fleet
from vllm_pd_scheduler.connectors import Splice
from vllm_pd_scheduler.envoy.ext_proc.stream import (
    Answer,
    Continue,
    Message,
    Phase,
    Route,
    State,
    Stream,
    StreamError,
)
from vllm_pd_scheduler.request.errors import reject

HEADERS = fleet.COMPLETION


class Case(unittest.TestCase):
    def setUp(self) -> None:
        self.router = fleet.build()

    def forward(self) -> Any:
        return fleet.forward(self.router)

    @property
    def in_flight(self) -> int:
        return fleet.in_flight(self.router)

    def in_state(self, state: State) -> Stream:
        """A stream that came to a state on the usual way."""
        stream = Stream()
        steps: list[Callable[[], object]] = [
            lambda: stream.receive(Message(Phase.REQUEST_HEADERS, headers=HEADERS)),
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


class TableTest(Case):
    """What each message does in each state; where it cannot come, the stream ends."""

    # (state, message, end of stream): action and next state
    TABLE: ClassVar[dict[tuple[State, Phase, bool], tuple[type, State]]] = {
        (State.AWAIT_HEADERS, Phase.REQUEST_HEADERS, False): (Continue, State.AWAIT_BODY),
        (State.AWAIT_HEADERS, Phase.REQUEST_HEADERS, True): (Route, State.ROUTING),
        (State.AWAIT_BODY, Phase.REQUEST_BODY, False): (Route, State.ROUTING),  # trailers will follow
        (State.AWAIT_BODY, Phase.REQUEST_BODY, True): (Route, State.ROUTING),
        **{
            (State.FORWARDED, phase, end): (Continue, State.FORWARDED)
            for phase in (
                Phase.REQUEST_TRAILERS,
                Phase.RESPONSE_HEADERS,
                Phase.RESPONSE_BODY,
                Phase.RESPONSE_TRAILERS,
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
        message = Message(phase, end, headers=HEADERS, body=b"{}")
        if expected is None:
            with self.assertRaisesRegex(StreamError, f"^{phase.name} cannot come in state {state.name}$"):
                stream.receive(message)
            self.assertIs(stream.state, state)
        else:
            action = stream.receive(message)
            self.assertIs(type(action), expected[0])
            self.assertIs(stream.state, expected[1])
            if isinstance(action, Continue):
                self.assertIs(action.phase, phase, "a reply must be of the kind of its message")
        self.assertEqual(self.in_flight, held)
        stream.close()
        self.assertEqual(self.in_flight, 0)

    def test_an_outcome_can_come_only_while_routing(self) -> None:
        for state in State:
            for rejected in (False, True):
                with self.subTest(state=state.name, rejected=rejected):
                    stream = self.in_state(state)
                    held = self.in_flight
                    outcome = reject(503, "none", "no_decode") if rejected else self.forward()
                    if state is State.ROUTING:
                        answer = stream.routed(outcome)
                        self.assertEqual(answer, Answer(Phase.REQUEST_BODY, outcome))
                        self.assertIs(stream.state, State.CLOSED if rejected else State.ROUTED)
                    else:
                        with self.assertRaisesRegex(
                            StreamError, f"nothing is being routed in state {state.name}"
                        ):
                            stream.routed(outcome)
                        self.assertEqual(self.in_flight, held, "what came late is given back at once")
                    stream.close()
                    self.assertEqual(self.in_flight, 0)

    def test_the_end_can_come_in_every_state(self) -> None:
        for state in State:
            with self.subTest(state=state.name):
                stream = self.in_state(state)
                for _ in range(2):
                    stream.close()
                    self.assertIs(stream.state, State.CLOSED)
                    self.assertEqual(self.in_flight, 0)


class ConversationsTest(Case):
    def test_a_request_with_a_body(self) -> None:
        stream = Stream()
        self.assertEqual(
            stream.receive(Message(Phase.REQUEST_HEADERS, headers=HEADERS)), Continue(Phase.REQUEST_HEADERS)
        )
        self.assertEqual(
            stream.receive(Message(Phase.REQUEST_BODY, True, body=b'{"a":1}')), Route(HEADERS, [b'{"a":1}'])
        )
        forward = self.forward()
        self.assertEqual(stream.routed(forward), Answer(Phase.REQUEST_BODY, forward))
        self.assertIs(stream.forward, forward)
        self.assertEqual(self.in_flight, 1)
        stream.sent()
        self.assertEqual(stream.receive(Message(Phase.RESPONSE_TRAILERS)), Continue(Phase.RESPONSE_TRAILERS))
        self.assertEqual(self.in_flight, 1, "until the response has ended")
        stream.close()
        self.assertEqual(self.in_flight, 0)

    def test_headers_only(self) -> None:
        stream = Stream()
        headers = {":method": "GET", ":path": "/v1/models"}
        self.assertEqual(stream.receive(Message(Phase.REQUEST_HEADERS, True, headers)), Route(headers))
        forward = self.forward()
        self.assertEqual(stream.routed(forward), Answer(Phase.REQUEST_HEADERS, forward))

    def test_an_empty_body(self) -> None:
        stream = Stream()
        stream.receive(Message(Phase.REQUEST_HEADERS, headers=HEADERS))
        self.assertEqual(stream.receive(Message(Phase.REQUEST_BODY, True)), Route(HEADERS))

    def test_headers_that_are_missing(self) -> None:
        self.assertEqual(Stream().receive(Message(Phase.REQUEST_HEADERS, True)), Route({}))

    def test_a_body_with_trailers(self) -> None:
        stream = Stream()
        stream.receive(Message(Phase.REQUEST_HEADERS, headers=HEADERS))
        self.assertIsInstance(stream.receive(Message(Phase.REQUEST_BODY, False, body=b"{}")), Route)
        stream.routed(self.forward())
        stream.sent()
        self.assertEqual(stream.receive(Message(Phase.REQUEST_TRAILERS)), Continue(Phase.REQUEST_TRAILERS))
        stream.close()

    def test_a_rejected_request_ends_the_stream(self) -> None:
        stream = self.in_state(State.ROUTING)
        answer = reject(400, "no", "bad_body")
        self.assertEqual(stream.routed(answer), Answer(Phase.REQUEST_BODY, answer))
        self.assertIs(stream.state, State.CLOSED)
        self.assertIsNone(stream.forward)

    def test_a_client_that_leaves_while_routing(self) -> None:
        stream = self.in_state(State.ROUTING)
        stream.close()
        with self.assertRaises(StreamError):
            stream.routed(self.forward())
        self.assertEqual(self.in_flight, 0)


class UnsentTest(Case):
    def test_a_forward_is_unsent_until_it_was_sent(self) -> None:
        for state in State:
            with self.subTest(state.name):
                stream = self.in_state(state)
                self.assertIs(stream.unsent, stream.forward if state is State.ROUTED else None)

    def test_what_was_never_sent_stays_so(self) -> None:
        """An error's answer has nothing to be freed, and what comes before the outcome is no sign of it."""
        stream = self.in_state(State.ROUTING)
        stream.sent()
        self.assertIs(stream.state, State.ROUTING)
        stream.routed(reject(503, "none", "no_decode"))
        stream.sent()
        self.assertIs(stream.state, State.CLOSED)
        self.assertIsNone(stream.unsent)


class BodySizeTest(Case):
    def test_announced_by_the_headers_or_come(self) -> None:
        def of(**more: Any) -> int:
            return Message(**{"phase": Phase.REQUEST_HEADERS, **more}).body_size

        self.assertEqual(of(headers={"content-length": "70"}), 70)
        self.assertEqual(of(headers={"content-length": "70"}, end_of_stream=True), 0)
        self.assertEqual(of(headers={}), 0, "chunked: known when it has come")
        self.assertGreater(of(headers={"content-length": "9" * 5000}), 1 << 60)
        self.assertEqual(of(headers={"content-length": "-1"}), 0)
        self.assertEqual(of(phase=Phase.REQUEST_BODY, body=b"12345"), 5)
        self.assertEqual(of(phase=Phase.RESPONSE_TRAILERS), 0)

    def test_a_request_can_be_refused_at_either_message(self) -> None:
        messages = [
            Message(Phase.REQUEST_HEADERS, headers=HEADERS),
            Message(Phase.REQUEST_BODY, True, body=b"{}"),
        ]
        for count in (1, 2):
            stream = Stream()
            for message in messages[:count]:
                stream.receive(message)
            full = reject(429, "full", "memory")
            self.assertEqual(stream.refused(full), Answer(messages[count - 1].phase, full))
            self.assertIs(stream.state, State.CLOSED)

    def test_a_body_is_let_go_of_when_it_was_sent(self) -> None:
        stream = self.in_state(State.ROUTED)
        assert stream.forward is not None
        stream.forward.body, stream.forward.splice = b"large", Splice(1, b"large")
        stream.sent()
        self.assertEqual((stream.forward.body, stream.forward.splice), (None, None))


if __name__ == "__main__":
    unittest.main()
