"""Where a body is in a message, by its wire format."""

import random
import unittest

from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from vllm_pd_scheduler.envoy.ext_proc.wire import body_size, find, prefix

BODY = b"x" * 300


def request(**more: bool) -> pb.ProcessingRequest:
    made = pb.ProcessingRequest(**more)
    made.attributes["envoy.filters.http.ext_proc"].fields["a"].string_value = "b" * 200
    made.metadata_context.filter_metadata["m"].fields["c"].number_value = 1.5
    made.protocol_config.request_body_mode = 2
    return made


class BodySizeTest(unittest.TestCase):
    def test_a_bodys_message_with_all_that_can_go_with_it(self) -> None:
        for kind in ("request_body", "response_body"):
            made = request(observability_mode=True)
            getattr(made, kind).body = BODY
            getattr(made, kind).end_of_stream = True
            found = body_size(made.SerializeToString())
            self.assertEqual(found, getattr(made, kind).ByteSize())

    def test_in_any_order_of_the_fields(self) -> None:
        body = pb.ProcessingRequest()
        body.request_body.body = BODY
        parts = [request().SerializeToString(), body.SerializeToString()]
        for order in (parts, parts[::-1]):
            self.assertEqual(body_size(b"".join(order)), body.request_body.ByteSize())

    def test_other_kinds_have_none(self) -> None:
        for kind in ("request_headers", "response_headers", "request_trailers", "response_trailers"):
            made = request()
            getattr(made, kind).SetInParent()
            self.assertEqual(body_size(made.SerializeToString()), 0)
        self.assertEqual(body_size(b""), 0)

    def test_never_more_than_there_is(self) -> None:
        body = pb.ProcessingRequest()
        body.request_body.body = BODY
        data = body.SerializeToString()
        for length in range(len(data)):
            self.assertLessEqual(body_size(data[:length]), length)
        self.assertLess(body_size(b"\x22\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01ab"), 4)

    def test_any_bytes(self) -> None:
        draw = random.Random(1)
        for _ in range(2000):
            data = draw.randbytes(draw.randrange(40))
            self.assertLessEqual(body_size(data), len(data))

    def test_many_small_fields_are_not_walked_through(self) -> None:
        """What comes after so many is no message of Envoy's."""
        body = pb.ProcessingRequest()
        body.request_body.body = BODY
        self.assertEqual(body_size(b"\x50\x01" * 1000 + body.SerializeToString()), 0)


class FindTest(unittest.TestCase):
    def test_a_field_is_where_it_was_put(self) -> None:
        for size in (0, 1, 127, 128, 20_000):
            for before in (b"", request().SerializeToString()):
                body = b"y" * size
                data = before + prefix((4, 1), size) + body + b"\x50\x01"
                outer = find(data, 4, 0, len(data))
                assert outer is not None
                inner = find(data, 1, outer.start, outer.end)
                assert inner is not None
                self.assertEqual(data[inner.start : inner.end], body)
                self.assertEqual(outer.without(data, 0, len(data)), before + b"\x50\x01")
                self.assertEqual(inner.without(data, outer.start, outer.end), b"")
                self.assertEqual(pb.ProcessingRequest.FromString(data).request_body.body, body)

    def test_what_is_not_there(self) -> None:
        for data in (b"", b"\x22\x05abc", b"\x21" + bytes(8), b"\x2a\x01a", b"\xff" * 30):
            self.assertIsNone(find(data, 4, 0, len(data)))


if __name__ == "__main__":
    unittest.main()
