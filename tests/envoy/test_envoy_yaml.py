"""``envoy/envoy.yaml``: of the right types, accepted by Envoy, and of one mind with the Python side."""

import importlib
import json
import pkgutil
import tempfile
import unittest
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from envoy.config.bootstrap.v3 import bootstrap_pb2
from google.protobuf import json_format

from tests.support.certificates import make_certificates
from tests.support.envoy_config import accepted_by_envoy, cluster, every
from tests.support.processes import unused_ports
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.config.tls import InstanceTlsConfig
from vllm_pd_scheduler.envoy.configuration import WEBSOCKET_PATH, config_path, render_config
from vllm_pd_scheduler.envoy.eds import SERVING
from vllm_pd_scheduler.envoy.ext_proc.messages import DETAILS_PREFIX
from vllm_pd_scheduler.envoy.load_assignment import METADATA_NAMESPACE
from vllm_pd_scheduler.envoy.ports import EnvoyPorts
from vllm_pd_scheduler.models import PD_ROLES
from vllm_pd_scheduler.request import headers
from vllm_pd_scheduler.request.api import APIS
from vllm_pd_scheduler.request.gateway_names import STEERS_INSTANCES
from vllm_pd_scheduler.request.path import PUBLIC_PATHS, SPLIT_PATHS, path_regex

RAW = yaml.safe_load(config_path().read_text(encoding="utf-8"))
TEXT = config_path().read_text(encoding="utf-8")


def listener(config: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [each for each in config["static_resources"]["listeners"] if each["name"] == name]
    return found


def port_of(where: dict[str, Any]) -> int:
    return where["address"]["socket_address"]["port_value"]


class TypesTest(unittest.TestCase):
    def test_it_is_a_bootstrap_with_every_extension_of_its_own_type(self) -> None:
        for name in set(every("@type", RAW)):
            package = importlib.import_module(name.removeprefix("type.googleapis.com/").rpartition(".")[0])
            for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
                if module.name.endswith("_pb2"):
                    importlib.import_module(module.name)  # registers its types
        bootstrap = json_format.ParseDict(RAW, bootstrap_pb2.Bootstrap())  # refuses unknown fields
        resources = bootstrap.static_resources
        self.assertLessEqual({"ingress", "prefill"}, {each.name for each in resources.listeners})
        self.assertLessEqual(
            {"decode", "prefill", "scheduler", "xds"}, {each.name for each in resources.clusters}
        )


class EnvoyTest(unittest.IsolatedAsyncioTestCase):
    def setUp(self) -> None:
        self.directory = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.ports = EnvoyPorts(*unused_ports(4), "127.0.0.1")

    async def test_envoy_takes_it_with_other_ports(self) -> None:
        await accepted_by_envoy(render_config(self.ports))

    async def test_envoy_takes_it_without_a_prefill_listener(self) -> None:
        await accepted_by_envoy(render_config(replace(self.ports, prefill=None)))

    async def test_envoy_takes_it_with_ipv6(self) -> None:
        config = render_config(replace(self.ports, address="::"))
        address = listener(config, "ingress")["address"]["socket_address"]
        self.assertEqual((address["address"], address["ipv4_compat"]), ("::", True))
        await accepted_by_envoy(config)

    async def test_envoy_takes_it_with_other_public_paths(self) -> None:
        await accepted_by_envoy(render_config(self.ports, public_paths=["/a.b/*/c", "/own"]))
        await accepted_by_envoy(render_config(self.ports, public_paths=[]))

    async def test_envoy_takes_it_with_tls_to_instances(self) -> None:
        made = make_certificates(self.directory)
        tls = InstanceTlsConfig(ca=made.ca, **made.client)
        config = render_config(self.ports, tls)
        for role in PD_ROLES:
            (context,) = [
                each["typed_config"] for each in every("transport_socket", cluster(config, role.value))
            ]
            self.assertIs(context["auto_sni_san_validation"], True)
            self.assertEqual(set(every("filename", context)), {made.ca, *made.client.values()})
        await accepted_by_envoy(config)

    def test_as_it_is_no_instances_certificate_passes(self) -> None:
        for role in PD_ROLES:
            (accepted,) = every("verify_certificate_hash", cluster(RAW, role.value))
            self.assertEqual(accepted, ["0" * 64])


class PortsTest(unittest.TestCase):
    def test_the_defaults_are_those_of_the_file(self) -> None:
        self.assertEqual(render_config(EnvoyPorts()), RAW)
        config = SchedulerConfig()
        ports = EnvoyPorts()
        self.assertEqual(config.grpc_port, ports.grpc)
        self.assertIsNone(config.prefill_listener)

    def test_envoy_looks_only_where_the_scheduler_listens(self) -> None:
        """A health check opens a socket each half second where nobody does; one it cannot have ends Envoy."""
        for continues in (False, True):
            clusters = render_config(EnvoyPorts(continues=continues))["static_resources"]["clusters"]
            (found,) = (each for each in clusters if each["name"] == "continuation")
            self.assertEqual("health_checks" in found, continues)

    def test_without_a_port_there_is_no_prefill_listener(self) -> None:
        ports = EnvoyPorts(prefill=None)
        names = [each["name"] for each in render_config(ports)["static_resources"]["listeners"]]
        self.assertEqual(names, ["ingress"])
        self.assertEqual([option for option, *_ in ports.listeners()], ["--port", "--envoy-admin-port"])

    def test_each_port_goes_to_its_place(self) -> None:
        config = render_config(EnvoyPorts(1001, 1002, 1003, 1004, "10.0.0.1"))
        self.assertEqual(port_of(listener(config, "ingress")), 1001)
        self.assertEqual(port_of(listener(config, "prefill")), 1002)
        self.assertEqual(port_of(config["admin"]), 1003)
        for name in ("scheduler", "xds"):
            (endpoint,) = every("endpoint", cluster(config, name)["load_assignment"])
            self.assertEqual(port_of(endpoint), 1004)
        address = listener(config, "ingress")["address"]["socket_address"]
        self.assertEqual(address, {"address": "10.0.0.1", "port_value": 1001})
        self.assertEqual(
            listener(config, "prefill")["address"],
            {"socket_address": {"address": "127.0.0.1", "port_value": 1002}},
        )

    def test_a_socket_in_place_of_the_schedulers_port(self) -> None:
        config = render_config(EnvoyPorts(grpc_socket="/run/pd/grpc"))
        for name in ("scheduler", "xds"):
            (endpoint,) = every("endpoint", cluster(config, name)["load_assignment"])
            self.assertEqual(endpoint["address"], {"pipe": {"path": "/run/pd/grpc"}})

    def test_socket_options_only_where_their_numbers_mean_what_they_say(self) -> None:
        with mock.patch("sys.platform", "darwin"):
            config = render_config(EnvoyPorts())
        self.assertEqual([*every("socket_options", config)], [])
        self.assertEqual([*every("upstream_bind_config", config)], [])
        self.assertEqual(len([*every("socket_options", RAW)]), 4)

    def test_what_trusts_its_clients_listens_on_loopback_only(self) -> None:
        for where in (listener(RAW, "prefill"), RAW["admin"]):
            self.assertEqual(where["address"]["socket_address"]["address"], "127.0.0.1")


class NamesTest(unittest.TestCase):
    """What both sides must call by the same name."""

    def test_clusters_by_role(self) -> None:
        for role in PD_ROLES:
            found = cluster(RAW, role.value)
            self.assertEqual(found["type"], "EDS")
            sources = list(every("override_host_sources", found))
            self.assertEqual(sources, [[{"header": headers.DESTINATION}]])

    def test_headers(self) -> None:
        names = [value for value in vars(headers).values() if isinstance(value, str)]
        ours = [name for name in names if name.startswith(("x-pd-", "x-gateway-"))]
        self.assertLessEqual({headers.DESTINATION, headers.PREFILL, headers.DECODE}, set(ours))
        for name in ours:
            if name not in (headers.REASON, *headers.ASKED):
                self.assertIn(name, TEXT)
        added = [
            option["header"]
            for options in every("response_headers_to_add", listener(RAW, "ingress"))
            for option in options
        ]
        values = {header["key"]: header["value"] for header in added}
        told = {headers.PREFILL, headers.DECODE, headers.CACHED_TOKENS, headers.DECISION, headers.REASON}
        self.assertEqual(set(values), told)
        self.assertIn(headers.PREFILL, values[headers.PREFILL])
        shown = f"%UPSTREAM_METADATA({METADATA_NAMESPACE}:id)%%REQ({headers.RANK_SHOWN})%"
        self.assertEqual(values[headers.DECODE], shown)

    def test_clients_never_steer(self) -> None:
        (extensions,) = every("early_header_mutation_extensions", listener(RAW, "ingress"))
        mutations = [each for those in every("mutations", extensions) for each in those]
        removed = {each["remove"] for each in mutations if "remove" in each}
        matchers = [each["remove_on_match"]["key_matcher"] for each in mutations if "remove_on_match" in each]
        prefixes = tuple(matcher["prefix"] for matcher in matchers if matcher["ignore_case"])
        for name in vars(headers).values():
            if isinstance(name, str) and name.startswith(headers.STEERING_PREFIXES):
                gone = name.startswith(prefixes) or name in removed
                # CONTINUES is the scheduler's by its key, and comes by way of the ingress.
                self.assertEqual(gone, name not in (*headers.ASKED, headers.CONTINUES), name)
        self.assertLessEqual(STEERS_INSTANCES, removed)

    def test_the_schedulers_own_answers_are_known_by_their_details(self) -> None:
        self.assertIn(f"response.code_details.startsWith('{DETAILS_PREFIX}')", json.dumps(RAW))

    def test_what_clients_ask_for_ends_here(self) -> None:
        (gone,) = every("request_headers_to_remove", listener(RAW, "ingress"))
        self.assertEqual(set(gone), {*headers.ASKED, headers.CONTINUES})

    def test_health_asks_the_cluster_that_says_who_can_serve(self) -> None:
        self.assertEqual(list(every("cluster_min_healthy_percentages", RAW)), [{SERVING: {"value": 100}}])
        self.assertEqual(cluster(RAW, SERVING)["type"], "EDS")

    def test_the_scheduler_gets_only_what_has_come_whole(self) -> None:
        (filters,) = every("http_filters", listener(RAW, "ingress"))
        names = [each["name"].removeprefix("envoy.filters.http.") for each in filters]
        self.assertEqual(names[names.index("ext_proc") - 1], "buffer")

    def test_the_largest_body_is_the_same(self) -> None:
        limits = {*every("per_connection_buffer_limit_bytes", RAW), *every("max_request_bytes", RAW)}
        self.assertEqual(limits, {SchedulerConfig().max_body_bytes})


class PathsTest(unittest.TestCase):
    """One spelling of each path, and the same public ones here and there."""

    @staticmethod
    def routes(config: dict[str, Any], name: str) -> list[dict[str, Any]]:
        (host,) = every("virtual_hosts", listener(config, "ingress"))
        return [route for route in host[0]["routes"] if route.get("name") == name]

    def public(self, config: dict[str, Any]) -> list[str]:
        matches = [route["match"] for route in self.routes(config, "public")]
        return [match["path"] if "path" in match else match["safe_regex"]["regex"] for match in matches]

    def test_split_paths(self) -> None:
        for split in self.routes(RAW, "split"):
            self.assertEqual(split["match"]["safe_regex"]["regex"].split("|"), self.split(PUBLIC_PATHS))

    @staticmethod
    def split(public: Sequence[str]) -> list[str]:
        """The paths that are tried again, since their requests have no other effect than an answer."""
        return [*SPLIT_PATHS, *(path for path in public if path in APIS)]

    def test_public_paths_by_default(self) -> None:
        self.assertEqual(self.public(RAW), [path_regex(path) for path in PUBLIC_PATHS])
        self.assertEqual(SchedulerConfig().public_paths, list(PUBLIC_PATHS))

    def test_public_paths_of_a_configuration(self) -> None:
        config = render_config(EnvoyPorts(), public_paths=["/own/*", "/v1/realtime"])
        self.assertEqual(self.public(config), [path_regex("/own/*"), "/v1/realtime"])
        self.assertEqual(self.routes(config, "websocket"), self.routes(RAW, "websocket"))
        config = render_config(EnvoyPorts(), public_paths=[])
        self.assertEqual(self.public(config) + self.routes(config, "websocket"), [])
        for path in ("/v1/messages", "/inference/v1/generate"):
            config = render_config(EnvoyPorts(), public_paths=[path])
            for split in self.routes(config, "split"):
                self.assertEqual(split["match"]["safe_regex"]["regex"], "|".join(self.split([path])))

    def test_the_route_for_websockets_is_one_of_a_public_path(self) -> None:
        (route,) = self.routes(RAW, "websocket")
        self.assertEqual(route["match"]["path"], WEBSOCKET_PATH)
        self.assertIn(WEBSOCKET_PATH, PUBLIC_PATHS)
        self.assertEqual(list(every("upgrade_type", RAW)), ["websocket"])

    def test_what_is_not_public_asks_nobody(self) -> None:
        *_, last = next(every("routes", listener(RAW, "ingress")))
        self.assertEqual((last["match"], last["direct_response"]), ({"prefix": "/"}, {"status": 404}))
        filters = last["typed_per_filter_config"]
        self.assertEqual(
            {name.rpartition(".")[2] for name, each in filters.items() if each["disabled"]},
            {"ext_proc", "lua"},
        )

    def test_envoy_makes_one_spelling_of_a_path(self) -> None:
        (manager,) = [each for each in every("typed_config", RAW) if each.get("stat_prefix") == "ingress"]
        self.assertIs(manager["normalize_path"], True)
        self.assertIs(manager["merge_slashes"], True)
        self.assertEqual(manager["path_with_escaped_slashes_action"], "UNESCAPE_AND_FORWARD")


class AnswersTest(unittest.TestCase):
    """What every error of Envoy's and the scheduler's brings."""

    def test_a_web_page_may_read_it(self) -> None:
        (config,) = every("local_reply_config", RAW)
        for mapper in config["mappers"]:
            expression = next(every("expression", mapper), "")
            status = next(every("status_code_filter", mapper), {"comparison": {"op": "GE"}})["comparison"]
            added = {
                each["header"]["key"]: each["header"]["value"] for each in mapper.get("headers_to_add", ())
            }
            with self.subTest(expression=expression, status=status):
                of_p = expression.endswith(("'pd_prefill_4xx'", "'pd_own'"))
                below_400 = status["op"] == "LE" and status["value"]["default_value"] < 400
                if of_p or below_400:
                    self.assertEqual(added, {})
                else:
                    self.assertEqual(added["access-control-allow-origin"], "*")
                    exposed = set(added["access-control-expose-headers"].split(", "))
                    self.assertEqual(exposed, {"x-request-id", headers.REASON, "retry-after"})

    def test_the_request_id_comes_back(self) -> None:
        """The client's, also where D has another; Envoy itself would send D's."""
        self.assertEqual(list(every("always_set_request_id_in_response", RAW)), [])
        (filters,) = every("http_filters", listener(RAW, "ingress"))
        (set_,) = filters[0]["typed_config"]["mutations"]["response_mutations"]
        mine = f"%REQ({headers.CLIENT_REQUEST_ID}?{headers.REQUEST_ID})%"
        self.assertEqual(set_["append"]["header"], {"key": headers.REQUEST_ID, "value": mine})


class ExtProcTest(unittest.TestCase):
    """Settings on which the design rests: a dead scheduler harms no request, and no token costs Python."""

    def test_mode(self) -> None:
        (filter_,) = [
            each
            for each in every("typed_config", listener(RAW, "ingress"))
            if each["@type"].endswith(".ext_proc.v3.ExternalProcessor")
        ]
        self.assertIs(filter_["failure_mode_allow"], True)
        mode = filter_["processing_mode"]
        self.assertEqual(mode["request_body_mode"], "BUFFERED")
        self.assertEqual(mode["response_body_mode"], "NONE")
        self.assertEqual(mode["response_trailer_mode"], "SEND")

    def test_retries_are_not_limited_by_envoys_default_of_three(self) -> None:
        for role in PD_ROLES:
            (thresholds,) = every("thresholds", cluster(RAW, role.value)["circuit_breakers"])
            self.assertGreaterEqual(thresholds[0]["max_retries"], 1000)


if __name__ == "__main__":
    unittest.main()
