"""Small configurations, and what is wrong with them."""

import tempfile
import unittest
from pathlib import Path
from typing import Any

from vllm_pd_scheduler.config import ConfigError, parse_config


def fleet(**more: Any) -> dict[str, Any]:
    """The smallest valid configuration, and what a test adds to it."""
    return {
        "prefill_instances": [{"id": "p0", "host": "10.0.0.1", "port": 8100}],
        "decode_instances": [{"id": "d0", "host": "10.0.0.2", "port": 8200}],
        **more,
    }


def decode(**more: Any) -> dict[str, Any]:
    """A configuration whose one decode instance is changed."""
    return fleet(decode_instances=[{"id": "d0", "host": "10.0.0.2", "port": 8200, **more}])


class ConfigCase(unittest.TestCase):
    def setUp(self) -> None:
        self.directory = Path(self.enterContext(tempfile.TemporaryDirectory()))

    def write(self, content: str | bytes, name: str = "config.json") -> Path:
        path = self.directory / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def problems(self, raw: Any) -> list[str]:
        with self.assertRaises(ConfigError) as caught:
            parse_config(raw, "c.json")
        self.assertEqual(
            str(caught.exception).splitlines(), [f"c.json: {each}" for each in caught.exception.problems]
        )
        return caught.exception.problems

    def assertOneProblem(self, raw: Any, pattern: str) -> None:
        problems = self.problems(raw)
        self.assertEqual(len(problems), 1, problems)
        self.assertRegex(problems[0], pattern)
