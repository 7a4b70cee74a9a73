"""How long D may take for the first byte of its answer."""

from tests.support.in_flight import InFlightCase
from vllm_pd_scheduler.request import headers as names
from vllm_pd_scheduler.routing.time_limits import LEASE_SHARE


class FirstByteTest(InFlightCase):
    async def test_limits(self) -> None:
        self.router = self.start(decode_first_byte_timeout=5.0, decode_seconds_per_token=0.5)
        for body, expected in (
            ({"stream": True, "max_tokens": 100}, 5.0),
            ({"max_tokens": 10}, 10.0),
            ({"max_tokens": 10, "max_completion_tokens": 4}, 10.0),  # a chat's alone
            ({"max_tokens": 1000}, 505.0),  # in one piece: may outlast the lease
            ({"max_tokens": None}, 5.0 + 32_768 * 0.5),
            ({"max_tokens": -5000}, 5.0 + 32_768 * 0.5),
            ({"max_tokens": True}, 5.0 + 32_768 * 0.5),
            ({"max_tokens": "many"}, 5.0 + 32_768 * 0.5),
        ):
            with self.subTest(body):
                forward = await self.forward(**body)
                self.assertEqual(forward.first_byte_timeout, expected)
                header = forward.headers().get(names.FIRST_BYTE_TIMEOUT)
                self.assertEqual(header, None if expected is None else str(int(expected * 1000)))

    async def test_a_stream_must_begin_before_its_hand_off_is_too_old(self) -> None:
        self.router = self.start(decode_first_byte_timeout=100.0, kv_lease_duration=30.0)
        forward = await self.forward(stream=True)
        self.assertEqual(forward.first_byte_timeout, 30.0 * LEASE_SHARE)

    async def test_so_must_an_answer_in_one_piece_that_is_expected_by_then(self) -> None:
        self.router = self.start(decode_first_byte_timeout=20.0, decode_seconds_per_token=0.1)
        for tokens, expected in ((30, 23.0), (200, 24.0), (300, 50.0)):
            forward = await self.forward(max_tokens=tokens)
            self.assertEqual(forward.first_byte_timeout, expected)

    async def test_a_limit_beyond_all_bounds(self) -> None:
        forward = await self.forward(n=2, max_tokens=10**300)
        self.assertLess(forward.first_byte_timeout or 0, 2e6)
