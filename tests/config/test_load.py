"""Configuration files: what cannot be read, and what is no JSON."""

import json
from pathlib import Path

from tests.support.config import ConfigCase, fleet
from vllm_pd_scheduler.config import ConfigError, load_config, parse_config


class FileTest(ConfigCase):
    def assertRefused(self, path: Path, pattern: str) -> None:
        with self.assertRaises(ConfigError) as caught:
            load_config(path)
        self.assertEqual(len(caught.exception.problems), 1, caught.exception.problems)
        self.assertRegex(caught.exception.problems[0], pattern)
        self.assertTrue(str(caught.exception).startswith(f"{path}: "))

    def test_a_file_that_cannot_be_read(self) -> None:
        self.assertRefused(self.directory / "none.json", r"^cannot be read: No such file")
        self.assertRefused(self.directory, r"^cannot be read: Is a directory")

    def test_a_file_that_is_not_json(self) -> None:
        cases: list[tuple[str | bytes, str]] = [
            ("", r"^line 1, column 1: not valid JSON: "),
            ('{\n  "strategy": least_load\n}', r"^line 2, column 15: not valid JSON: "),
            ('{"max_retries": 3,}', r"^line 1, column \d+: not valid JSON: "),
            (b'{"strategy": "\xff"}', r"UTF-8"),
            ("[" * 100_000, r"."),
            ('{"strategy": "weighted", "strategy": "least_load"}', r"^strategy: this key is given twice$"),
            ('{"max_retries": ' + "1" * 5000 + "}", r"^a number in it has too many digits$"),
        ]
        for content, pattern in cases:
            with self.subTest(content[:40]):
                self.assertRefused(self.write(content), pattern)

    def test_a_byte_order_mark_does_no_harm(self) -> None:
        self.assertEqual(load_config(self.write("\ufeff" + json.dumps(fleet()))), parse_config(fleet()))

    def test_a_string_path_does_as_well(self) -> None:
        self.assertEqual(load_config(str(self.write(json.dumps(fleet())))), parse_config(fleet()))
