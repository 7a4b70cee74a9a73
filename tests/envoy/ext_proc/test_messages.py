"""Envoy's messages: what is read of them, and what is written."""

import json
import sys
import unittest

from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from tests.support import ext_proc as fleet
from vllm_pd_scheduler.envoy.ext_proc.messages import DETAILS_PREFIX, LARGE_BYTES, decode, encode
from vllm_pd_scheduler.envoy.ext_proc.stream import Answer, Continue, Message, Phase, StreamError
from vllm_pd_scheduler.envoy.limits import MAX_MESSAGE_BYTES, BadMessage
from vllm_pd_scheduler.request.errors import Reject, reject
from vllm_pd_scheduler.rpc import StatusCode

OVERWRITE = 2  # HeaderValueOption.HeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD


def headers_of(mutation: pb.HeaderMutation) -> dict[str, str]:
    assert all(option.append_action == OVERWRITE for option in mutation.set_headers)
    return {option.header.key: option.header.raw_value.decode() for option in mutation.set_headers}


class DecodeTest(unittest.TestCase):
    def test_request_headers(self) -> None:
        request = pb.ProcessingRequest()
        request.request_headers.end_of_stream = True
        for name, value in ((":path", b"/v1/\xc3\xa9"), ("x-bad", b"\xff"), ("empty", b"")):
            request.request_headers.headers.headers.add(key=name, raw_value=value)
        request.request_headers.headers.headers.add(key="old", value="as text")
        message = decode(request.SerializeToString())
        self.assertEqual((message.phase, message.end_of_stream), (Phase.REQUEST_HEADERS, True))
        self.assertEqual(
            message.headers, {":path": "/v1/é", "x-bad": "\ufffd", "empty": "", "old": "as text"}
        )

    def test_headers_take_no_more_memory_than_their_bytes(self) -> None:
        request = pb.ProcessingRequest()
        values = ["\U0001f600" + "x" * size for size in (10, 200, 300, 60_000)]
        for number, value in enumerate(values):
            request.request_headers.headers.headers.add(key=f"x{number}", raw_value=value.encode())
        headers = decode(request.SerializeToString()).headers or {}
        self.assertEqual([headers["x0"], headers["x1"]], values[:2])
        self.assertEqual([len(headers["x2"]), len(headers["x3"])], [304, 60_004])
        self.assertLess(sum(map(sys.getsizeof, headers.values())), 65_000)

    def test_headers_that_no_body_will_follow(self) -> None:
        for mode, last in ((ProcessingMode.NONE, True), (ProcessingMode.BUFFERED, False)):
            request = pb.ProcessingRequest()
            request.request_headers.SetInParent()
            self.assertFalse(decode(request.SerializeToString()).end_of_stream)
            request.protocol_config.request_body_mode = mode
            self.assertIs(decode(request.SerializeToString()).end_of_stream, last)

    def test_request_body(self) -> None:
        request = pb.ProcessingRequest()
        request.request_body.body = b'{"a":1}'
        self.assertEqual(
            decode(request.SerializeToString()), Message(Phase.REQUEST_BODY, False, body=b'{"a":1}')
        )
        request.request_body.end_of_stream = True
        self.assertTrue(decode(request.SerializeToString()).end_of_stream)

    def test_a_large_body(self) -> None:
        body = b'{"a":"' + b"x" * LARGE_BYTES + b'"}'
        request = pb.ProcessingRequest()
        request.request_body.body = body
        request.attributes["a"].fields["b"].string_value = "c" * 300
        request.observability_mode = True
        for end_of_stream in (True, False):
            request.request_body.end_of_stream = end_of_stream
            data = request.SerializeToString()
            message = Message(Phase.REQUEST_BODY, end_of_stream, body=body)
            self.assertEqual(decode(data), message)
            again = pb.ProcessingRequest()  # of two bodies the last counts, and of two kinds the last
            again.request_body.body = b"last"
            self.assertEqual(decode(data + again.SerializeToString()).body, b"last")
            again.response_headers.SetInParent()
            self.assertIs(decode(data + again.SerializeToString()).phase, Phase.RESPONSE_HEADERS)
            for bad in (data[:-1], data[: LARGE_BYTES // 2], data + b"\xff", data + b"\x0b" * 9):
                with self.assertRaisesRegex(BadMessage, "^not a ProcessingRequest"):
                    decode(bad)

    def test_a_large_message_without_a_body(self) -> None:
        request = pb.ProcessingRequest()
        request.request_headers.headers.headers.add(key="x", raw_value=b"\x0a" * 2 * LARGE_BYTES)
        message = decode(request.SerializeToString())
        self.assertEqual(
            (message.phase, len((message.headers or {})["x"])), (Phase.REQUEST_HEADERS, 2 * LARGE_BYTES)
        )

    def test_all_others_are_known_by_their_phase(self) -> None:
        for phase in Phase:
            request = pb.ProcessingRequest()
            getattr(request, phase.name.lower()).SetInParent()
            with self.subTest(phase.name):
                self.assertIs(decode(request.SerializeToString()).phase, phase)

    def test_every_kind_that_the_protocol_knows_is_a_phase(self) -> None:
        kinds = {field.name for field in pb.ProcessingRequest.DESCRIPTOR.oneofs_by_name["request"].fields}
        self.assertEqual(kinds, {phase.name.lower() for phase in Phase})

    def test_what_is_no_request(self) -> None:
        for data in (b"\xff\xff\xff", b"GET / HTTP/1.1"):
            with (
                self.subTest(data),
                self.assertRaisesRegex(BadMessage, "^not a ProcessingRequest$") as caught,
            ):
                decode(data)
            self.assertIs(caught.exception.code, StatusCode.INVALID_ARGUMENT)
        with self.assertRaisesRegex(StreamError, "unknown kind None"):
            decode(b"")


class LargeTest(unittest.TestCase):
    """Only a body may be large: as many bytes of headers cost a hundred times as much."""

    def setUp(self) -> None:
        self.body = pb.ProcessingRequest()
        self.body.request_body.body = b" " * (4 * MAX_MESSAGE_BYTES)
        self.headers = pb.ProcessingRequest()
        self.headers.request_headers.headers.headers.add(key="x", raw_value=b"v" * MAX_MESSAGE_BYTES)

    def test_a_body(self) -> None:
        self.assertEqual(len(decode(self.body.SerializeToString()).body), 4 * MAX_MESSAGE_BYTES)

    def test_all_else(self) -> None:
        attributes = pb.ProcessingRequest()
        attributes.request_body.body = b"{}"
        attributes.attributes["a"].fields["b"].string_value = "c" * MAX_MESSAGE_BYTES
        for message in (
            self.headers.SerializeToString(),
            attributes.SerializeToString(),
            self.body.SerializeToString() + self.headers.SerializeToString(),
            b"\xff" * (MAX_MESSAGE_BYTES + 1),
        ):
            with self.assertRaises(BadMessage) as caught:
                decode(message)
            self.assertIs(caught.exception.code, StatusCode.RESOURCE_EXHAUSTED)


class EncodeTest(unittest.TestCase):
    def setUp(self) -> None:
        self.router = fleet.build()

    def encode(self, reply: Continue | Answer) -> pb.ProcessingResponse:
        return pb.ProcessingResponse.FromString(b"".join(encode(reply)))

    def test_continue_is_of_the_kind_of_its_message(self) -> None:
        for phase in Phase:
            with self.subTest(phase.name):
                response = self.encode(Continue(phase))
                self.assertEqual(response.WhichOneof("response"), phase.name.lower())
                expected = pb.ProcessingResponse()
                getattr(expected, phase.name.lower()).SetInParent()
                self.assertEqual(response, expected, "and changes nothing")

    def test_forward_with_a_hand_off(self) -> None:
        headers = {**fleet.COMPLETION, "x-pd-decode": "mine", "x-other": "kept"}
        raw = '{"prompt": "é"}'.encode()
        forward = fleet.forward(self.router, headers, raw)
        response = self.encode(Answer(Phase.REQUEST_BODY, forward))
        self.assertEqual(response.WhichOneof("response"), "request_body")
        common = response.request_body.response
        self.assertFalse(common.HasField("body_mutation"), "Envoy has the body")
        handoff = response.dynamic_metadata["vllm_pd"]
        spliced = raw[: int(handoff["at"])] + handoff["text"].encode()
        self.assertEqual(json.loads(spliced), {"prompt": "é", "kv_transfer_params": fleet.PARAMS})
        sent = headers_of(common.header_mutation)
        self.assertEqual(sent, forward.headers())
        self.assertEqual(sent["x-gateway-destination-endpoint"], "10.0.0.1:80,10.0.0.1:81")
        self.assertEqual(sent["x-pd-prefill"], "p0")
        self.assertNotIn("content-length", sent, "Envoy's filter sets it, for each attempt")
        self.assertEqual(list(common.header_mutation.remove_headers), ["x-pd-decode"])
        self.assertEqual(common.status, pb.CommonResponse.CONTINUE)

    def test_forward_with_a_hand_off_and_a_body_that_was_cut(self) -> None:
        raw = b'{"prompt": "a", "kv_transfer_params": {}}'
        forward = fleet.forward(self.router, fleet.COMPLETION, raw)
        response = self.encode(Answer(Phase.REQUEST_BODY, forward))
        common, handoff = response.request_body.response, response.dynamic_metadata["vllm_pd"]
        body = common.body_mutation.body
        self.assertEqual(json.loads(body), {"prompt": "a"})
        self.assertEqual(headers_of(common.header_mutation)["content-length"], str(len(body)))
        spliced = body[: int(handoff["at"])] + handoff["text"].encode()
        self.assertEqual(json.loads(spliced), {"prompt": "a", "kv_transfer_params": fleet.PARAMS})

    def test_forward_to_a_sidecar_that_not_every_d_may_have(self) -> None:
        forward = fleet.forward(self.router, fleet.COMPLETION, b'{"prompt": ["a", "b"]}')
        forward.only = forward.decode[:1]
        response = self.encode(Answer(Phase.REQUEST_BODY, forward))
        self.assertEqual(dict(response.dynamic_metadata["vllm_pd"]), {"only": "10.0.0.1:80"})

    def test_forward_to_ranks(self) -> None:
        """Which one is told by host, since each attempt is at another."""
        forward = fleet.forward(self.router, fleet.COMPLETION, b'{"prompt": ["a", "b"]}')
        forward.ranks = {"10.0.0.1:80": 3, "[fd00::1]:80": 0}
        response = self.encode(Answer(Phase.REQUEST_BODY, forward))
        told = {name: dict(value) for name, value in response.dynamic_metadata["vllm_pd"].items()}
        self.assertEqual(told, {"ranks": {"10.0.0.1:80": "3", "[fd00::1]:80": "0"}})
        sent = headers_of(response.request_body.response.header_mutation)
        self.assertNotIn("x-data-parallel-rank", sent)

    def test_bodies_of_every_size(self) -> None:
        forward = fleet.forward(self.router, fleet.COMPLETION, b'{"prompt": ["a", "b"]}')
        for size in (0, 1, 100, 127, 128, 16_383, 16_384, 2_100_000):
            forward.body = b"x" * size
            for phase in (Phase.REQUEST_BODY, Phase.REQUEST_HEADERS):
                common = getattr(self.encode(Answer(phase, forward)), phase.name.lower()).response
                self.assertEqual(common.body_mutation.body, forward.body)
                expected = {**forward.headers(), "content-length": str(size)}
                self.assertEqual(headers_of(common.header_mutation), expected)

    def test_forward_with_the_clients_body(self) -> None:
        forward = fleet.forward(self.router, fleet.COMPLETION, b'{"prompt": ["a", "b"]}')
        self.assertIsNone(forward.body)
        common = self.encode(Answer(Phase.REQUEST_BODY, forward)).request_body.response
        self.assertFalse(common.HasField("body_mutation"))
        self.assertEqual(forward.splice, None)
        sent = headers_of(common.header_mutation)
        self.assertEqual(sent["x-gateway-destination-endpoint"], "10.0.0.1:80,10.0.0.1:81")
        self.assertNotIn("content-length", sent)
        self.assertNotIn("x-pd-prefill", sent)

    def test_an_empty_body_is_still_a_new_one(self) -> None:
        forward = fleet.forward(self.router, fleet.COMPLETION, b'{"prompt": ["a", "b"]}')
        forward.body = b""
        common = self.encode(Answer(Phase.REQUEST_BODY, forward)).request_body.response
        self.assertEqual(common.body_mutation.WhichOneof("mutation"), "body")
        self.assertEqual(headers_of(common.header_mutation)["content-length"], "0")

    def test_forward_of_headers_only(self) -> None:
        response = self.encode(Answer(Phase.REQUEST_HEADERS, fleet.forward(self.router)))
        self.assertEqual(response.WhichOneof("response"), "request_headers")
        self.assertIn(
            "x-gateway-destination-endpoint", headers_of(response.request_headers.response.header_mutation)
        )

    def test_reject(self) -> None:
        for phase in (Phase.REQUEST_HEADERS, Phase.REQUEST_BODY):
            response = self.encode(Answer(phase, reject(503, "none left", "no_decode")))
            self.assertEqual(response.WhichOneof("response"), "immediate_response")
            immediate = response.immediate_response
            self.assertEqual((immediate.status.code, immediate.details), (503, f"{DETAILS_PREFIX}no_decode"))
            self.assertEqual(
                headers_of(immediate.headers),
                {
                    "content-type": "application/json",
                    "retry-after": "1",
                    "x-llm-d-request-dropped-reason": "rejected-no-endpoints",
                    "x-pd-reason": "no_decode",
                },
            )
            error = json.loads(immediate.body)["error"]
            self.assertEqual(
                error,
                {"message": "none left", "type": "ServiceUnavailableError", "param": None, "code": 503},
            )

    def test_an_instances_own_answer_passes_byte_by_byte(self) -> None:
        answer = Reject(400, b"\xff\x00 raw", {"content-type": "text/plain"}, "prefill_4xx")
        immediate = self.encode(Answer(Phase.REQUEST_BODY, answer)).immediate_response
        self.assertEqual((immediate.status.code, immediate.body), (400, b"\xff\x00 raw"))
        self.assertEqual(headers_of(immediate.headers), {"content-type": "text/plain"})


if __name__ == "__main__":
    unittest.main()
