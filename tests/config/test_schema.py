"""Configuration: defaults, and every mistake named with its key, all at once, without a secret."""

import contextlib
import json
import os
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

from pydantic import ValidationError

from tests.support.config import ConfigCase, decode, fleet
from vllm_pd_scheduler.config import (
    ConfigError,
    SchedulerConfig,
    SecretSource,
    is_loopback,
    load_config,
    parse_config,
)
from vllm_pd_scheduler.models import InstanceRole

EXAMPLE = Path(__file__).parents[2] / "scheduler_config.example.json"
SECRET = "sk-do-not-show"
STRATEGIES = ("strategy", "prefill_strategy", "decode_strategy", "shadow_strategy")


class DefaultsTest(ConfigCase):
    def test_defaults_are_those_of_the_documented_table(self) -> None:
        config = parse_config(fleet())
        table = {
            "strategy": "least_load",
            "health_check_interval": 5.0,
            "health_check_timeout": 2.0,
            "max_retries": 3,
            "drain_timeout": 30.0,
            "load_weight": 0.5,
            "kv_cache_weight": 0.3,
            "latency_weight": 0.2,
        }
        self.assertEqual({key: getattr(config, key) for key in table}, table)
        self.assertEqual(
            {key: type(getattr(config, key)) for key in table}, {k: type(v) for k, v in table.items()}
        )

    def test_the_example_loads_and_has_the_same_defaults(self) -> None:
        config = load_config(EXAMPLE)
        written = json.loads(EXAMPLE.read_text(encoding="utf-8"))
        lists = {"prefill_instances", "decode_instances"}
        defaults = SchedulerConfig()
        for key in written.keys() - lists:
            self.assertEqual(getattr(config, key), getattr(defaults, key), key)
        self.assertEqual(
            [(i.instance_id, i.role, i.url) for i in config.instances()],
            [
                ("prefill-0", InstanceRole.PREFILL, "http://127.0.0.1:8100"),
                ("prefill-1", InstanceRole.PREFILL, "http://127.0.0.1:8101"),
                ("decode-0", InstanceRole.DECODE, "http://127.0.0.1:8200"),
                ("decode-1", InstanceRole.DECODE, "http://127.0.0.1:8201"),
            ],
        )

    def test_a_preset_sets_what_is_not_given(self) -> None:
        config = parse_config(fleet(preset="low_latency"))
        self.assertEqual((config.strategy, config.disaggregation, config.late_binding), ("slo", "tpot", True))
        config = parse_config(
            fleet(preset="low_latency", disaggregation="always", decode_strategy="least_load")
        )
        self.assertEqual((config.disaggregation, config.late_binding), ("always", True))
        self.assertEqual(
            [config.strategy_of(role) for role in (InstanceRole.PREFILL, InstanceRole.DECODE)],
            ["slo", "least_load"],
        )
        printed = json.loads(config.model_dump_json())
        self.assertEqual(parse_config(printed), config)
        several: tuple[Any, ...] = ("best", 1, ["low_latency"], {})
        for wrong in several:
            with self.assertRaisesRegex(ConfigError, "preset: "):
                parse_config(fleet(preset=wrong))

    def test_whole_numbers_are_numbers(self) -> None:
        config = parse_config(fleet(health_check_interval=2, load_weight=1, drain_timeout=0))
        self.assertEqual(
            (config.health_check_interval, config.load_weight, config.drain_timeout), (2.0, 1.0, 0.0)
        )

    def test_what_check_prints_loads_to_the_same(self) -> None:
        config = parse_config(fleet(strategy="weighted", max_retries=1))
        again = load_config(self.write(config.model_dump_json(indent=2)))
        self.assertEqual(again, config)

    def test_it_cannot_be_changed(self) -> None:
        with self.assertRaises(ValueError):
            parse_config(fleet()).strategy = "weighted"  # type: ignore[misc]


class MistakesTest(ConfigCase):
    """One clear line for each mistake."""

    def test_each(self) -> None:
        cases: list[tuple[dict[str, Any], str]] = [
            # unknown keys
            *(
                (fleet(discovery=[source]), rf"^discovery\[0\]\.{key}: unknown key{hint}$")
                for source, key, hint in (
                    ({"type": "docker", "netwrok": "x"}, "netwrok", r"; did you mean 'network'\?"),
                    (
                        {"type": "kubernetes", "selector": "a=b", "ports": [1], "port": 1},
                        "port",
                        r"; did you mean 'ports'\?",
                    ),
                    (
                        {
                            "type": "docker",
                            "host": "tcp://h:1",
                            "tls": {"ca": "a", "cert": "b", "key": "c", "crt": "d"},
                        },
                        r"tls\.crt",
                        r"; did you mean 'cert'\?",
                    ),
                    ({"type": "docker", "labels": "x"}, "labels", ""),
                )
            ),
            (fleet(tracing={"sample": 1}), r"^tracing\.sample: unknown key"),
            (fleet(grpc_tls={"self_sgined": True}), r"^grpc_tls\.self_sgined: .*mean 'self_signed'\?$"),
            (fleet(models={"a": {"targets": {"b": 1}, "target": 2}}), r"^models\.a\.target: .*'targets'\?$"),
            # kinds of objects
            (fleet(discovery=[{"type": "dsn"}]), r"^discovery\[0\]\.type: must be one of 'dns', 'docker', "),
            (fleet(discovery=[{"role": "decode"}]), r"^discovery\[0\]\.type: missing; one of 'dns', "),
            (fleet(discovery=[3]), r"^discovery\[0\].*: must be a JSON object$"),
            (
                fleet(discovery=[{"type": "kubernetes", "services": {"prefil": "b"}}]),
                r"^discovery\[0\]\.services: the key 'prefil' must be 'prefill', 'decode' or 'encode'$",
            ),
            (fleet(models={"": {"targets": {"a": 1}}}), r"^models: the key '' must not be empty$"),
            (fleet(models={"a": {"targets": {}}}), r"^models\.a\.targets: must not be empty$"),
            (fleet(models={"a": {"targets": "b"}}), r"^models\.a\.targets: must be a JSON object$"),
            (fleet(models={"docker": {"targets": "b"}}), r"^models\.docker\.targets: must be a JSON object$"),
            *(
                (raw, rf"^{key}: must be the name of a connector, or ")
                for wrong in (3, None, {"typ": "nixl"}, {"type": "nixl", "lease": [1]})
                for raw, key in (
                    (fleet(connector=wrong), "connector"),
                    (decode(connector=wrong or 3), r"decode_instances\[0\]\.connector"),
                )
            ),
            (
                fleet(encode_instances=[{"id": "e", "host": "e.x", "port": 1, "connector": "nixl"}]),
                r"^encode_instances\[0\]\.connector: 'nixl' is no connector of an encode instance.*: ec-nixl",
            ),
            (
                fleet(encode_instances=[{"id": "e", "host": "e.x", "port": 1}], prefill_leg="sidecar"),
                r'^encode_instances: not with "prefill_leg": "sidecar"',
            ),
            (fleet(encode_connector="nixl"), r"^encode_connector: must be 'ec-nixl' or 'ec-example'$"),
            *(
                (decode(data_parallel_size=wrong), r"^decode_instances\[0\]\.data_parallel_size: must be ")
                for wrong in (0, -1, 65, "2", 2.5, None)
            ),
            (
                {**decode(data_parallel_size=2), "prefill_leg": "sidecar"},
                r"^decode_instances\[0\]\.data_parallel_size: a sidecar cannot be told a rank of P: ",
            ),
            *(
                (config, r"^decode_instances\[0\]\.data_parallel_size: .* 'sglang' cannot be told a rank: ")
                for config in (
                    {**decode(data_parallel_size=2), "connector": "sglang"},
                    decode(data_parallel_size=2, connector="sglang"),
                )
            ),
            (fleet(stratgy="weighted"), r"^stratgy: unknown key; did you mean 'strategy'\?$"),
            (fleet(colour="red"), r"^colour: unknown key$"),
            (decode(prot=1), r"^decode_instances\[0\]\.prot: unknown key; did you mean 'port'\?$"),
            (decode(weight=1), r"^decode_instances\[0\]\.weight: unknown key$"),
            (fleet(api_key={"env": "HOME", "extra": 1}), r"^api_key\.extra: unknown key$"),
            # wrong types
            (fleet(strategy=5), r"^strategy: must be a valid string$"),
            (fleet(strategy=None), r"^strategy: must be a valid string$"),
            (fleet(health_check_interval="5"), r"^health_check_interval: must be a valid number$"),
            (fleet(health_check_interval=True), r"^health_check_interval: must be a valid number$"),
            (fleet(max_retries=3.0), r"^max_retries: must be a valid integer$"),
            (fleet(max_retries="3"), r"^max_retries: must be a valid integer$"),
            (fleet(max_retries=True), r"^max_retries: must be a valid integer$"),
            (fleet(max_retries=None), r"^max_retries: must be a valid integer$"),
            (fleet(load_weight=[0.5]), r"^load_weight: must be a valid number$"),
            (fleet(decode_instances={"id": "d0"}), r"^decode_instances: must be a valid list$"),
            (fleet(decode_instances=["10.0.0.2:8200"]), r"^decode_instances\[0\]: must be a JSON object$"),
            (fleet(api_key="k"), r'^api_key: must be {"env": NAME} or {"file": PATH}$'),
            (fleet(instance_tls=True), r"^instance_tls: must be a JSON object$"),
            (decode(id=7), r"^decode_instances\[0\]\.id: must be a valid string$"),
            (decode(host=7), r"^decode_instances\[0\]\.host: must be a valid string$"),
            (decode(port="8200"), r"^decode_instances\[0\]\.port: must be a valid integer$"),
            # out of range
            (decode(port=0), r"^decode_instances\[0\]\.port: must be greater than or equal to 1$"),
            (decode(port=65536), r"^decode_instances\[0\]\.port: must be less than or equal to 65535$"),
            (decode(port=-1), r"^decode_instances\[0\]\.port: must be greater than or equal to 1$"),
            (fleet(grpc_port=70000), r"^grpc_port: must be less than or equal to 65535$"),
            (fleet(admin_port=0), r"^admin_port: must be greater than or equal to 1$"),
            (
                fleet(health_check_interval=0),
                r"^health_check_interval: must be greater than or equal to 0\.05$",
            ),
            (fleet(health_check_interval=1e-9), r"^health_check_interval: must be greater than or equal to "),
            (
                fleet(health_check_interval=1e9),
                r"^health_check_interval: must be less than or equal to 3600$",
            ),
            (
                fleet(health_check_timeout=-1.0),
                r"^health_check_timeout: must be greater than or equal to 0\.001$",
            ),
            (fleet(drain_timeout=-0.1), r"^drain_timeout: must be greater than or equal to 0$"),
            (fleet(load_weight=-0.5), r"^load_weight: must be greater than or equal to 0$"),
            (fleet(latency_weight=float("nan")), r"^latency_weight: must be less than or equal to 1000000$"),
            (fleet(prefill_timeout=float("inf")), r"^prefill_timeout: must be less than or equal to 604800$"),
            (fleet(max_retries=-1), r"^max_retries: must be greater than or equal to 0$"),
            (fleet(unhealthy_threshold=0), r"^unhealthy_threshold: must be greater than or equal to 1$"),
            (
                fleet(disaggregation=0),
                r"^disaggregation: must be 'always', 'never', 'auto', 'tpot' or a whole number of tok",
            ),
            (
                fleet(disaggregation="some"),
                r"^disaggregation: must be 'always', 'never', 'auto', 'tpot' or a whole number",
            ),
            (
                fleet(disaggregation=True),
                r"^disaggregation: must be 'always', 'never', 'auto', 'tpot' or a whole number",
            ),
            (fleet(late_binding=1), r"^late_binding: must be a valid boolean$"),
            (fleet(max_kv_usage=90), r"^max_kv_usage: must be less than or equal to 1$"),
            (fleet(max_body_bytes=10), r"^max_body_bytes: must be greater than or equal to 1024$"),
            # missing
            (fleet(decode_instances=[{"id": "d0", "port": 1}]), r"^decode_instances\[0\]\.host: missing$"),
            (fleet(decode_instances=[]), r"^decode_instances: there are none"),
            (fleet(prefill_instances=[]), r"^prefill_instances: there are none"),
            # ids and hosts
            (decode(id=""), r"^decode_instances\[0\]\.id: must be 1 to 128 letters, digits, "),
            (decode(id="a b"), r"^decode_instances\[0\]\.id: "),
            (decode(id="a/b"), r"^decode_instances\[0\]\.id: "),
            (decode(id="a\n"), r"^decode_instances\[0\]\.id: "),
            (decode(id="x" * 129), r"^decode_instances\[0\]\.id: "),
            (
                decode(id="p0"),
                r"^decode_instances\[0\]\.id: 'p0' is the id of prefill_instances\[0\] already$",
            ),
            # others
            (
                fleet(strategy="fastest"),
                r"^strategy: unknown strategy 'fastest'; choose one of round_robin, least",
            ),
            (
                fleet(strategy="low_latency"),
                r"Class'\. low_latency is a preset: give \"preset\": \"low_latency\" in the configuration$",
            ),
            (
                fleet(strategy="no.such:Thing"),
                r"^strategy: strategy 'no.such:Thing' cannot be loaded: No module",
            ),
            (fleet(strategy="os:getcwd"), r"^strategy: 'os:getcwd' is not a subclass of "),
            *(
                (fleet(**{key: ""}), rf"^{key}: unknown strategy ''; choose one of round")
                for key in STRATEGIES
            ),
            (fleet(session_header="X-Chat"), r"^session_header: must be the name of a header in lower case"),
            (fleet(state_file=""), r"^state_file: must be a path$"),
            (fleet(prefill_listener="127.0.0.1:10001"), r"^prefill_listener: must be http://HOST:PORT"),
            (
                fleet(public_paths=["/v1/models", "v1"]),
                r"^public_paths\[1\]: must be a path like '/v1/models'",
            ),
            *(
                (
                    fleet(metaserver_port=9005, metaserver_url=url),
                    r"^metaserver_url: must be http://HOST:PORT",
                )
                for url in (
                    "",
                    "ftp://h:1",
                    "http://",
                    "http://h/path",
                    "http://:9005",
                    "http://h:0",
                    "http://h:65536",
                    "http://h:x",
                    "http://[::1",
                    "http://[x]:1",
                    "http://0.0.0.0:9005",
                    "https://[::]:9005",
                    "http://10.0.11:1",
                    "http://a@h:1",
                )
            ),
            *(
                (fleet(prefill_listener=url), r"^prefill_listener: must be http://HOST:PORT, without a path$")
                for url in (
                    "http://h/path",
                    "http://:10001",
                    "http://h:0",
                    "http://h:65536",
                    "http://h:1?a",
                    "http://h?a",
                    "http://a@h:1",
                    "http://[::1:1",
                    "http://::1:1",
                    "http://10.0.11:1",
                    "https://h:1",
                )
            ),
            *(
                (
                    fleet(**{key: host}, admin_token={"env": "PATH"}),
                    rf"^{key}: must be an IP address, or a name",
                )
                for key in ("grpc_host", "admin_host")
                for host in ("", "http://h", "h:1", "[::1]", "127.1", "*", "a b")
            ),
            (fleet(admin_port=9002), r"^admin_port: 127\.0\.0\.1:9002 is where grpc_port listens already$"),
            (
                fleet(grpc_host="0.0.0.0", grpc_port=10001, prefill_listener="http://127.0.0.1:10001"),
                r"^prefill_listener: 127\.0\.0\.1:10001 is where grpc_port listens already$",
            ),
            (
                fleet(admin_host="localhost", admin_port=9002),
                r"^admin_port: localhost:9002 is where grpc_port listens already$",
            ),
            (
                decode(host="localhost", port=9003),
                r"^decode_instances\[0\]: localhost:9003 is no instance, but our own admin_port$",
            ),
            (
                decode(host="127.0.0.1", port=10001) | {"prefill_listener": "http://127.0.0.1:10001"},
                r"^decode_instances\[0\]: 127\.0\.0\.1:10001 is no instance, but our own prefill_listener$",
            ),
            (
                decode(host="10.0.0.1", port=8100),
                r"^decode_instances\[0\]: 10\.0\.0\.1:8100 is the address of prefill_instances\[0\] already$",
            ),
            (fleet(**{"a\nb": 1}), r"^'a\\nb': unknown key$"),
            (fleet(max_waiting=10**7), r"^max_waiting: must be less than or equal to 1000000$"),
            (fleet(max_in_flight_tokens=10**400), r"^max_in_flight_tokens: "),
            (fleet(queue_timeout=10**400), r"^queue_timeout: "),
            (
                fleet(admin_host="0.0.0.0"),
                r"^admin_token: needed because admin_host 0\.0\.0\.0 can be reached",
            ),
        ]
        for raw, pattern in cases:
            with self.subTest(pattern):
                self.assertOneProblem(raw, pattern)

    def test_hosts(self) -> None:
        good = ["10.0.0.1", "vllm-0", "vllm_0.svc.cluster.local", "a.b.", "::1", "[fe80::1]", "0.vllm"]
        for host in good:
            with self.subTest(host):
                self.assertEqual(parse_config(decode(host=host)).decode_instances[0].host, host.strip("[]"))
        bad = ["", " ", "http://h", "h:80", "h/", "a b", "-a", "a-", ".a", "1:2", "[::1]:80", "h@i", "ü"]
        bad += ["10.0.0.1\n", "a..b", "x" * 64, "x" * 254, "[10.0.0.1", "::1]", "[vllm-0]", "1:2%eth0"]
        bad += ["0", "127.1", "10.0.11", "10.0.0.1.", "10.0.0.256", "010.0.0.1", "0x7f.0X1"]
        for host in bad:
            with self.subTest(host):
                self.assertOneProblem(decode(host=host), r"^decode_instances\[0\]\.host: ")

    def test_a_host_has_one_spelling(self) -> None:
        for host, kept in (
            ("0:0:0:0:0:0:0:1", "::1"),
            ("[2001:DB8:0::A]", "2001:db8::a"),
            ("::ffff:10.0.0.1", "10.0.0.1"),
            ("::FFFF:a00:1", "10.0.0.1"),
            ("VLLM-0.Pool.", "vllm-0.pool."),
        ):
            with self.subTest(host):
                config = parse_config(decode(host=host))
                self.assertEqual(config.decode_instances[0].host, kept)
                self.assertEqual([i.host for i in config.instances()][-1], kept)

    def test_what_looks_like_an_address_and_is_none(self) -> None:
        for host, why in (
            ("10.0.11", "neither an IP address in full nor a DNS name"),
            ("127.1", "neither"),
            ("0", "neither"),
            ("2130706433", "neither"),
            ("0x7f.0.0.0x1", "neither"),
            ("010.0.0.1", "neither"),
            ("10.0.0.256", "neither"),
            ("10.0.0.1.", "neither"),
            ("fe80::1%eth0", "has a zone"),
            ("0.0.0.0", "is no server's own"),
            ("::", "is no server's own"),
            ("224.0.0.1", "is no server's own"),
            ("ff02::1", "is no server's own"),
            ("255.255.255.255", "is no server's own"),
            ("::10.0.0.1", "is no server's own"),
        ):
            with self.subTest(host):
                self.assertOneProblem(decode(host=host), rf"^decode_instances\[0\]\.host: .*{why}")

    def test_doubles_are_found_across_and_within_roles(self) -> None:
        entries = [
            {"id": "d0", "host": "h", "port": 1},
            {"id": "d0", "host": "h", "port": 2},
            {"id": "d1", "host": "h", "port": 1},
        ]
        self.assertEqual(
            self.problems(fleet(decode_instances=entries)),
            [
                "decode_instances[1].id: 'd0' is the id of decode_instances[0] already",
                "decode_instances[2]: h:1 is the address of decode_instances[0] already",
            ],
        )

    def test_d_that_ask_for_prefills_can_reach_whom_they_ask(self) -> None:
        layerwise = {"connector": "ascend-layerwise"}
        self.assertOneProblem(
            fleet(**layerwise), r"^metaserver_port: needed because decode_instances\[0\] asks.*; give"
        )
        self.assertOneProblem(decode(**layerwise), r"^metaserver_port: needed")
        there = {**layerwise, "metaserver_port": 9005}
        self.assertOneProblem(
            fleet(**there), r"^metaserver_host: 127.0.0.1 cannot be reached from .*10.0.0.2"
        )
        for more in ({"metaserver_host": "0.0.0.0"}, {"metaserver_url": "http://10.0.0.5:9005"}):
            parse_config(fleet(**there, **more))
        for wrong in ("10.0.0.5:9005", "http://a/b", "ftp://a", "http://u@a", 'http://a"'):
            self.assertOneProblem(fleet(metaserver_url=wrong), r"^metaserver_url: must be http://HOST:PORT")
        self.assertOneProblem(fleet(metaserver_port=9003), r"^metaserver_port: .*admin_port listens already")

    def test_a_double_beside_another_mistake(self) -> None:
        """It is told too, and nothing that only follows from the mistake."""
        entries = [
            {"id": "p0", "host": "10.0.0.9", "port": "8200"},
            {"id": "d1", "host": "10.0.0.1", "port": 8100, "colour": "red"},
            {"id": "d1", "host": "10.0.0.9", "port": 0, "tls": True},
            "d1",
            {"host": "10.0.0.9", "port": 1},
        ]
        self.assertEqual(
            sorted(
                self.problems(fleet(decode_instances=entries, instance_tls=3, admin_port="x", grpc_port=9003))
            ),
            [
                "admin_port: must be a valid integer",
                "decode_instances[0].id: 'p0' is the id of prefill_instances[0] already",
                "decode_instances[0].port: must be a valid integer",
                "decode_instances[1].colour: unknown key",
                "decode_instances[1]: 10.0.0.1:8100 is the address of prefill_instances[0] already",
                "decode_instances[2].id: 'd1' is the id of decode_instances[1] already",
                "decode_instances[2].port: must be greater than or equal to 1",
                "decode_instances[3]: must be a JSON object",
                "decode_instances[4].id: missing",
                "instance_tls: must be a JSON object",
            ],
        )

    def test_an_empty_object_lacks_both_roles(self) -> None:
        self.assertEqual(
            [problem.split(":")[0] for problem in self.problems({})],
            ["prefill_instances", "decode_instances"],
        )

    def test_everything_that_is_wrong_is_said_at_once(self) -> None:
        raw = {
            "strategy": "fastest",
            "max_retries": "3",
            "colour": "red",
            "health_check_interval": 0,
            "admin_host": "0.0.0.0",
            "api_key": {"env": "VLLM_PD_NOT_SET"},
            "decode_instances": [
                {"id": "d0", "host": "h", "port": 1},
                {"id": "d0", "host": "h", "port": 70000},
                {"id": "d0", "host": "h", "port": 2},
            ],
        }
        keys = sorted(problem.split(":")[0] for problem in self.problems(raw))
        self.assertEqual(
            keys,
            [
                "admin_token",
                "api_key",
                "colour",
                "decode_instances[1].id",
                "decode_instances[1].port",
                "decode_instances[2].id",
                "health_check_interval",
                "max_retries",
                "prefill_instances",
                "strategy",
            ],
        )

    def test_a_document_that_is_no_object(self) -> None:
        for raw, kind in [
            ([], "an array"),
            ("x", "a string"),
            (None, "null"),
            (True, "a boolean"),
            (1, "a number"),
        ]:
            with self.subTest(kind):
                self.assertEqual(self.problems(raw), [f"must be a JSON object, not {kind}"])


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
