"""What is read of a gateway's messages, and a part of an answer that goes back without being read."""

import unittest

from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_pd_scheduler.envoy.ext_proc.messages import PART_BYTES, decode, pass_on
from vllm_pd_scheduler.routing.answer_head import AnswerHead

FULL_DUPLEX = ProcessingMode.FULL_DUPLEX_STREAMED


def part(body: bytes, last: bool = False, metadata: str | None = None) -> pb.ProcessingRequest:
    request = pb.ProcessingRequest()
    request.response_body.body, request.response_body.end_of_stream = body, last
    if metadata is not None:
        request.metadata_context.SetInParent()
        if metadata:
            request.metadata_context.filter_metadata["envoy.lb"].fields["a"].string_value = metadata
    return request


class PassOnTest(unittest.TestCase):
    @settings(max_examples=150, deadline=None)
    @given(
        st.integers(0, PART_BYTES), st.booleans(), st.sampled_from([None, "", "a", "b" * 200]), st.booleans()
    )
    @example(PART_BYTES, True, None, False)
    def test_it_says_the_same(self, size: int, last: bool, metadata: str | None, mutable: bool) -> None:
        request = part(b"t" * size, last, metadata)
        data = request.SerializeToString()
        passed = pass_on(bytearray(data) if mutable else data)
        assert passed is not None
        self.assertEqual((passed.size, passed.end_of_stream), (size, last))
        response = pb.ProcessingResponse.FromString(passed.before + passed.part)
        streamed = response.response_body.response.body_mutation.streamed_response
        self.assertEqual((streamed.body, streamed.end_of_stream), (b"t" * size, last))

    def test_what_is_too_long_or_something_else_is_not_passed_on(self) -> None:
        others = [part(b"t" * (PART_BYTES + 1)).SerializeToString(), b"", b"\x2a", b"\x2a\x80"]
        for kind in ("request_headers", "request_body", "response_headers", "response_trailers"):
            request = pb.ProcessingRequest()
            getattr(request, kind).SetInParent()
            others.append(request.SerializeToString())
            # The last of several is the one that counts.
            others.append(part(b"t").SerializeToString() + request.SerializeToString())
        others.append(part(b"t").SerializeToString() * 2)
        with_unknown = part(b"t")
        with_unknown.response_body.grpc_message_compressed = True
        others.append(with_unknown.SerializeToString())
        for data in others:
            with self.subTest(data[:20]):
                self.assertIsNone(pass_on(data))

    @settings(max_examples=500, deadline=None)
    @given(st.one_of(st.binary(max_size=40), st.binary(max_size=40).map(lambda tail: b"\x2a" + tail)))
    def test_any_bytes(self, data: bytes) -> None:
        passed = pass_on(data)
        if passed is None:
            return
        try:
            request = pb.ProcessingRequest.FromString(data)
        except Exception:
            return  # within metadata, which is not looked at
        response = pb.ProcessingResponse.FromString(passed.before + passed.part)
        streamed = response.response_body.response.body_mutation.streamed_response
        self.assertEqual(streamed.body, request.response_body.body)
        self.assertEqual(streamed.end_of_stream, request.response_body.end_of_stream)


class FirstMessageTest(unittest.TestCase):
    def setUp(self) -> None:
        self.request = pb.ProcessingRequest()
        self.request.request_headers.headers.headers.add(key=":path", raw_value=b"/")

    def test_the_mode(self) -> None:
        self.assertIsNone(decode(self.request.SerializeToString()).streamed)
        modes = self.request.protocol_config
        for request_mode, response_mode in (
            (FULL_DUPLEX, FULL_DUPLEX),
            (FULL_DUPLEX, ProcessingMode.NONE),
            (ProcessingMode.BUFFERED, ProcessingMode.NONE),
        ):
            modes.request_body_mode, modes.response_body_mode = request_mode, response_mode
            message = decode(self.request.SerializeToString())
            self.assertIs(message.streamed, request_mode == FULL_DUPLEX)
            self.assertIs(message.answer_streamed, response_mode == FULL_DUPLEX)
            self.assertFalse(message.end_of_stream)

    def test_the_subset(self) -> None:
        self.assertIsNone(decode(self.request.SerializeToString()).subset)
        metadata = self.request.metadata_context.filter_metadata
        metadata["envoy.lb"].fields["x-gateway-destination-endpoint-subset"].string_value = "10.0.0.1:80"
        self.assertIsNone(decode(self.request.SerializeToString()).subset, "another namespace")
        field = metadata["envoy.lb.subset_hint"].fields["x-gateway-destination-endpoint-subset"]
        for texts in (["10.0.0.1:80", "10.0.0.2"], ["10.0.0.1:80, 10.0.0.2 "], [" ", ""], []):
            field.list_value.ClearField("values")
            field.list_value.SetInParent()
            for text in texts:
                field.list_value.values.add(string_value=text)
            expected = frozenset({"10.0.0.1:80", "10.0.0.2"}) if any(map(str.strip, texts)) else frozenset()
            self.assertEqual(decode(self.request.SerializeToString()).subset, expected)
        for text in ("10.0.0.1:80,10.0.0.2", ""):
            field.string_value = text
            self.assertEqual(
                decode(self.request.SerializeToString()).subset,
                frozenset(text.split(",")) - {""},
            )
        field.number_value = 1.0
        self.assertEqual(decode(self.request.SerializeToString()).subset, frozenset())


class AnswerHeadTest(unittest.TestCase):
    def head(self, served: str | None = None, **headers: str) -> AnswerHead | None:
        request = pb.ProcessingRequest()
        for name, value in headers.items():
            name = name.replace("_", "-")
            request.response_headers.headers.headers.add(key=name, raw_value=value.encode())
        if served is not None:
            fields = request.metadata_context.filter_metadata["envoy.lb"].fields
            fields["x-gateway-destination-endpoint-served"].string_value = served
        return decode(request.SerializeToString()).head

    def test_of_an_instance(self) -> None:
        found = self.head("10.0.0.1:80", **{":status": "503", "date": "today", "retry_after": "7"})
        self.assertEqual(found, AnswerHead(503, "10.0.0.1:80", False, 1, 7.0))

    def test_of_the_gateway_itself(self) -> None:
        found = self.head(**{":status": "503", "content_type": "text/plain"})
        self.assertEqual(found, AnswerHead(503, "", True))

    def test_attempts(self) -> None:
        found = self.head(**{":status": "200", "server": "uvicorn", "x_envoy_attempt_count": "3"})
        self.assertEqual(found, AnswerHead(200, "", False, 3))

    def test_nonsense(self) -> None:
        found = self.head(**{":status": "ok", "date": "", "x_envoy_attempt_count": "-1", "retry_after": "x"})
        self.assertEqual(found, AnswerHead(0))


if __name__ == "__main__":
    unittest.main()
