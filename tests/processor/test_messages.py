"""Envoy's messages: what is read of them, and what is written."""

import json
import unittest

from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from vllm_pd_scheduler.errors import Reject, reject
from vllm_pd_scheduler.models import InstanceRole, PDInstance
from vllm_pd_scheduler.processor.messages import DETAILS_PREFIX, decode, encode
from vllm_pd_scheduler.processor.stream import Answer, Continue, Message, Phase, StreamError
from vllm_pd_scheduler.registry import Registry
from vllm_pd_scheduler.router import Forward

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

    def test_request_body(self) -> None:
        request = pb.ProcessingRequest()
        request.request_body.body = b'{"a":1}'
        self.assertEqual(
            decode(request.SerializeToString()), Message(Phase.REQUEST_BODY, False, body=b'{"a":1}')
        )
        request.request_body.end_of_stream = True
        self.assertTrue(decode(request.SerializeToString()).end_of_stream)

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
            with self.subTest(data), self.assertRaisesRegex(StreamError, "^not a ProcessingRequest: "):
                decode(data)
        with self.assertRaisesRegex(StreamError, "unknown kind None"):
            decode(b"")


class EncodeTest(unittest.TestCase):
    def setUp(self) -> None:
        self.registry = Registry()
        self.endpoints = [
            self.registry.add(PDInstance(f"d{n}", InstanceRole.DECODE, "10.0.0.1", 80 + n)) for n in range(2)
        ]
        self.prefill = self.registry.add(PDInstance("p0", InstanceRole.PREFILL, "10.0.0.2", 90))

    def forward(self, body: bytes | None, *, split: bool = True, remove: list[str] | None = None) -> Forward:
        reservation = self.registry.reserve(self.endpoints[0])
        return Forward(self.endpoints, self.prefill if split else None, body, remove or [], reservation)

    def encode(self, reply: Continue | Answer) -> pb.ProcessingResponse:
        return pb.ProcessingResponse.FromString(encode(reply))

    def test_continue_is_of_the_kind_of_its_message(self) -> None:
        for phase in Phase:
            with self.subTest(phase.name):
                response = self.encode(Continue(phase))
                self.assertEqual(response.WhichOneof("response"), phase.name.lower())
                expected = pb.ProcessingResponse()
                getattr(expected, phase.name.lower()).SetInParent()
                self.assertEqual(response, expected, "and changes nothing")

    def test_forward_with_a_new_body(self) -> None:
        answer = Answer(Phase.REQUEST_BODY, self.forward("é".encode(), remove=["x-pd-decode"]))
        response = self.encode(answer)
        self.assertEqual(response.WhichOneof("response"), "request_body")
        common = response.request_body.response
        self.assertEqual(common.body_mutation.body, "é".encode())
        self.assertEqual(
            headers_of(common.header_mutation),
            {
                "x-gateway-destination-endpoint": "10.0.0.1:80,10.0.0.1:81",
                "x-pd-prefill": "p0",
                "content-length": "2",
            },
        )
        self.assertEqual(list(common.header_mutation.remove_headers), ["x-pd-decode"])
        self.assertEqual(common.status, pb.CommonResponse.CONTINUE)

    def test_forward_with_the_clients_body(self) -> None:
        response = self.encode(Answer(Phase.REQUEST_BODY, self.forward(None, split=False)))
        common = response.request_body.response
        self.assertFalse(common.HasField("body_mutation"))
        self.assertEqual(
            headers_of(common.header_mutation), {"x-gateway-destination-endpoint": "10.0.0.1:80,10.0.0.1:81"}
        )

    def test_an_empty_body_is_still_a_new_one(self) -> None:
        common = self.encode(Answer(Phase.REQUEST_BODY, self.forward(b""))).request_body.response
        self.assertEqual(common.body_mutation.WhichOneof("mutation"), "body")
        self.assertEqual(headers_of(common.header_mutation)["content-length"], "0")

    def test_forward_of_headers_only(self) -> None:
        response = self.encode(Answer(Phase.REQUEST_HEADERS, self.forward(None, split=False)))
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
                headers_of(immediate.headers), {"content-type": "application/json", "retry-after": "1"}
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
