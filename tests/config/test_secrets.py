"""Secrets: where they come from, and that none is ever shown."""

import contextlib
import os
import unittest
from typing import Any
from unittest import mock

from pydantic import ValidationError

from tests.support.config import ConfigCase, decode, fleet
from vllm_pd_scheduler.config import (
    ConfigError,
    SchedulerConfig,
    SecretSource,
    is_loopback,
    parse_config,
)

SECRET = "sk-do-not-show"


class SecretsTest(ConfigCase):
    def keys(self, raw: dict[str, Any]) -> list[str | None]:
        return [instance.api_key for instance in parse_config(raw).instances()]

    @contextlib.contextmanager
    def environment(self, **values: str) -> Any:
        with mock.patch.dict(os.environ, values):
            yield

    def test_from_the_environment_and_from_a_file(self) -> None:
        path = self.write(f"{SECRET}-file\n", "secret")
        raw = decode(api_key={"file": str(path)}) | {"api_key": {"env": "PD_TEST_KEY"}}
        with self.environment(PD_TEST_KEY=f" {SECRET}-env\n"):
            self.assertEqual(self.keys(raw), [f"{SECRET}-env", f"{SECRET}-file"])
        self.assertEqual(self.keys(fleet()), [None, None])

    def test_one_that_is_not_there(self) -> None:
        os.environ.pop("PD_TEST_NOT_SET", None)
        empty, binary = self.write(" \n", "empty"), self.write(b"\xff\xfe", "binary")
        cases = [
            ({"env": "PD_TEST_NOT_SET"}, r"environment variable PD_TEST_NOT_SET is not set"),
            ({"file": "/no/such/file"}, r"secret file /no/such/file: No such file or directory"),
            ({"file": str(empty)}, r"secret file .*empty is empty"),
            ({"file": str(binary)}, r"secret file .*binary: is not text"),
            ({"file": str(self.directory)}, r"secret file .*: Is a directory"),
            ({}, r'give either "env" or "file"'),
            ({"env": "A", "file": "b"}, r'give either "env" or "file"'),
        ]
        for source, pattern in cases:
            for raw, key in [
                (fleet(api_key=source), "api_key"),
                (fleet(admin_token=source), "admin_token"),
                (decode(api_key=source), r"decode_instances\[0\]\.api_key"),
            ]:
                with self.subTest(source=source, key=key):
                    self.assertOneProblem(raw, f"^{key}: {pattern}$")

    def test_none_is_ever_shown(self) -> None:
        path = self.write(SECRET, "secret")
        raw = decode(api_key={"file": str(path)})
        raw |= {"api_key": {"env": "PD_TEST_KEY"}, "admin_token": {"env": "PD_TEST_KEY"}}
        with self.environment(PD_TEST_KEY=SECRET):
            config = parse_config(raw)
            instances = list(config.instances())
            self.assertEqual({instance.api_key for instance in instances}, {SECRET})
            shown = [repr(config), str(config), config.model_dump_json(), repr(config.model_dump())]
            shown += [repr(instances), str(instances[0])]
        self.assertNotIn(SECRET, "\n".join(shown))
        self.assertIn("PD_TEST_KEY", shown[2])

    def test_one_in_the_wrong_place_is_not_repeated_in_the_error(self) -> None:
        for raw in [
            fleet(api_key=SECRET),
            fleet(admin_token=SECRET),
            decode(api_key=SECRET),
            decode(api_key={"env": [SECRET]}),
            decode(api_key={"value": SECRET}),
            fleet(token=SECRET),
            fleet(strategy=[SECRET]),
        ]:
            with self.subTest(raw), self.assertRaises(ConfigError) as caught:
                parse_config(raw)
            error: BaseException | None = caught.exception
            self.assertNotIn(SECRET, str(error) + repr(error))

    def test_nor_in_pydantics_own(self) -> None:
        with self.assertRaises(ValidationError) as caught:
            SchedulerConfig.model_validate({"api_key": SECRET})
        self.assertNotIn(SECRET, str(caught.exception))

    def test_an_open_admin_port_needs_a_token(self) -> None:
        for host in ("0.0.0.0", "::", "10.1.2.3", "scheduler.local"):
            with self.subTest(host):
                self.assertOneProblem(fleet(admin_host=host), r"^admin_token: needed")
                with self.environment(PD_TEST_KEY=SECRET):
                    parse_config(fleet(admin_host=host, admin_token={"env": "PD_TEST_KEY"}))
        for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
            with self.subTest(host):
                self.assertTrue(is_loopback(host))
                parse_config(fleet(admin_host=host))


class SecretTest(unittest.TestCase):
    def test_a_secret_that_no_header_can_carry(self) -> None:
        for value in ("two\nlines", "schlüssel", "tab\there"):
            with (
                self.subTest(value),
                mock.patch.dict(os.environ, {"PD_KEY": value}),
                self.assertRaisesRegex(ValueError, "environment variable PD_KEY holds"),
            ):
                SecretSource(env="PD_KEY").read()
