"""What a refusal says, to OpenAI's clients and to llm-d's."""

import unittest

from vllm_pd_scheduler.request.errors import reject


class ErrorsTest(unittest.TestCase):
    def test_llmds_word_for_a_request_that_was_dropped(self) -> None:
        for status, reason, expected in (
            (503, "no_decode", "rejected-no-endpoints"),
            (429, "queue_full", "rejected-saturated"),
            (429, "queue_timeout", "rejected-ttl-expired"),
            (429, "queue_displaced", "evicted-priority"),
            (503, "draining", "rejected-shutting-down"),
            (400, "bad_body", None),
            (404, "not_public", None),
            (503, "lost", None),
        ):
            found = reject(status, "words", reason).headers
            self.assertEqual(
                (found.get("x-llm-d-request-dropped-reason"), found["x-pd-reason"]), (expected, reason)
            )


if __name__ == "__main__":
    unittest.main()
