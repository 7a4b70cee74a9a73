"""``envoy/gateway.yaml``: accepted by Envoy, and of one mind with ``envoy.yaml`` and the Python side."""

import subprocess
import unittest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from tests.envoy.test_envoy_yaml import RAW, every, listener
from tests.support.gateway import CONFIG, Gateway
from vllm_pd_scheduler.envoy.process import find_envoy
from vllm_pd_scheduler.models import InstanceRole
from vllm_pd_scheduler.request import gateway_names, headers

GATEWAY: dict[str, Any] = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))


def ext_proc() -> dict[str, Any]:
    (found,) = [each for each in every("typed_config", GATEWAY) if "processing_mode" in each]
    return dict(found)


class GatewayYamlTest(unittest.TestCase):
    def test_envoy_accepts_it_and_what_tests_make_of_it(self) -> None:
        kinds = [Gateway(), Gateway(tls=True, trailers=True, subset=["10.0.0.1:80"], source="header")]
        with TemporaryDirectory() as directory:
            for number, config in enumerate([GATEWAY, *(each.render(1, 2, 3) for each in kinds)]):
                path = Path(directory) / f"{number}.yaml"
                path.write_text(yaml.safe_dump(config))
                command = [find_envoy(), "--mode", "validate", "-c", str(path)]
                found = subprocess.run(command, capture_output=True, text=True)
                self.assertEqual(found.returncode, 0, found.stderr[-2000:])

    def test_the_names(self) -> None:
        (sources,) = every("override_host_sources", GATEWAY)
        at = {"key": gateway_names.LB_METADATA, "path": [{"key": headers.DESTINATION}]}
        self.assertEqual(sources, [{"metadata": at}, {"header": headers.DESTINATION}])
        (served,) = every("selected_host_key", GATEWAY)
        self.assertEqual(served, {"key": gateway_names.LB_METADATA, "path": [{"key": gateway_names.SERVED}]})
        self.assertEqual(list(every("http_header_name", GATEWAY)), [headers.DESTINATION])
        options = ext_proc()["metadata_options"]
        self.assertEqual(
            set(options["forwarding_namespaces"]["untyped"]),
            {gateway_names.LB_METADATA, gateway_names.SUBSET_METADATA},
        )
        self.assertEqual(options["receiving_namespaces"]["untyped"], [gateway_names.LB_METADATA])
        self.assertIn(
            InstanceRole.DECODE.value, [each["name"] for each in GATEWAY["static_resources"]["clusters"]]
        )

    def test_a_hand_off_is_never_retried(self) -> None:
        (policy,) = every("retry_policy", listener(GATEWAY, "gateway"))
        self.assertEqual(
            set(policy["retry_on"].split(",")),
            {"connect-failure", "refused-stream", "reset-before-request"},
        )
        self.assertTrue(ext_proc()["mutation_rules"]["allow_envoy"])
        self.assertEqual(list(every("include_attempt_count_in_response", GATEWAY)), [True])

    def test_the_scheduler_gets_only_what_has_come_whole(self) -> None:
        (filters,) = every("http_filters", listener(GATEWAY, "gateway"))
        self.assertEqual(filters[0]["name"], "envoy.filters.http.buffer")
        self.assertIn("processing_mode", filters[1]["typed_config"])

    def test_clients_never_steer(self) -> None:
        """Neither where a request passes without the scheduler."""
        (extensions,) = every("early_header_mutation_extensions", listener(GATEWAY, "gateway"))
        mutations = [each for those in every("mutations", extensions) for each in those]
        removed = {each["remove"] for each in mutations if "remove" in each}
        self.assertEqual(removed, gateway_names.STEERS_INSTANCES)
        matchers = [each["remove_on_match"]["key_matcher"] for each in mutations if "remove_on_match" in each]
        prefixes = {matcher["prefix"] for matcher in matchers if matcher["ignore_case"]}
        self.assertEqual(prefixes, {headers.DESTINATION, "x-envoy-", "x-override-"})

    def test_failing_open_is_guarded_as_in_envoys_own(self) -> None:
        scripts = [
            next(iter(every("default_source_code", listener(config, name))))
            for config, name in ((RAW, "ingress"), (GATEWAY, "gateway"))
        ]
        self.assertTrue(ext_proc()["failure_mode_allow"])
        self.assertEqual(scripts[0], scripts[1])


if __name__ == "__main__":
    unittest.main()
