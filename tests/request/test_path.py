"""Public paths: one spelling each, and ``*`` for one segment."""

import re
import unittest

from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.request.path import PUBLIC_PATH, PUBLIC_PATHS, SPLIT_PATHS, PublicPaths

ENGINE_ONLY = (
    "/metrics",
    "/load",
    "/server_info",
    "/kv_event_sources",
    "/reset_prefix_cache",
    "/sleep",
    "/wake_up",
    "/collective_rpc",
    "/start_profile",
    "/invocations",
    "/abort_requests",
    "/scale_elastic_ep",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/v1/completions/render",
    "/inference/v1/generate",
    "/docs",
    "/openapi.json",
    "/",
)
"""Paths of vLLM's for who runs it."""


class PublicPathsTest(unittest.TestCase):
    def test_by_default(self) -> None:
        public = PublicPaths(SchedulerConfig().public_paths)
        for path in (*SPLIT_PATHS, "/v1/models", "/v1/responses/resp_1", "/v1/responses/resp_1/cancel"):
            self.assertIn(path, public)
        for path in ENGINE_ONLY:
            self.assertNotIn(path, public)

    def test_no_other_spelling(self) -> None:
        public = PublicPaths(PUBLIC_PATHS)
        for path in (
            *(
                f"{path}{end}"
                for path in SPLIT_PATHS
                for end in ("/", "//", "%20", ";a", "#a", "\n", "%2f", "/.")
            ),
            "/V1/completions",
            "//v1/completions",
            "/v1/./completions",
            "/v1/chat%2Fcompletions",
            "/v1/chat/%63ompletions",
            "/v1/responses/",
            "/v1/responses/..",
            "/v1/responses/a%2Fb",
            "/v1/responses/a/b",
            "/v1/responses/a;b",
            "v1/completions",
            "",
        ):
            self.assertNotIn(path, public, path)

    def test_a_list_of_an_operators_own(self) -> None:
        public = PublicPaths(["/a.b", "/x/*/y", "/v1/*"])
        for path in ("/a.b", "/x/1/y", "/v1/anything", *SPLIT_PATHS):
            self.assertIn(path, public)
        for path in ("/aXb", "/x//y", "/x/1/2/y", "/x/%31/y", "/v1/any/thing", "/v1/any%74hing"):
            self.assertNotIn(path, public)
        self.assertNotIn("/v1/models", PublicPaths([]))

    def test_what_can_be_made_public(self) -> None:
        for path in (*PUBLIC_PATHS, *SPLIT_PATHS, "/metrics", "/a/*/b", "/a.b_c~d:e-f"):
            self.assertRegex(path, PUBLIC_PATH)
        for path in (
            "",
            "/",
            "a",
            "/a/",
            "//a",
            "/..",
            "/a/./b",
            "/a?b",
            "/a%20",
            "/a b",
            "/*a",
            "/a|b",
            "/(a)",
        ):
            self.assertIsNone(re.match(PUBLIC_PATH, path), path)


if __name__ == "__main__":
    unittest.main()
