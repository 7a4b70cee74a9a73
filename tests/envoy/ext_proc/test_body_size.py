"""How much of a message is a body, by its wire format."""

import random
import unittest

from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from vllm_pd_scheduler.envoy.ext_proc.body_size import body_size

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


if __name__ == "__main__":
    unittest.main()
