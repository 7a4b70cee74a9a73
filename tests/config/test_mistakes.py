"""Every mistake is named with its key, all at once."""

from typing import Any

from tests.support.config import ConfigCase, decode, fleet
from vllm_pd_scheduler.config import (
    parse_config,
)

STRATEGIES = ("strategy", "prefill_strategy", "decode_strategy", "shadow_strategy")


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
