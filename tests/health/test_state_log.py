"""Every change of an instance's state is one log line, and counted, whoever causes it."""

import logging
import unittest
from collections.abc import Callable

from vllm_pd_scheduler.fleet.breaker import BreakerPolicy
from vllm_pd_scheduler.fleet.condition import reason
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.fleet.registry import HealthPolicy, Registry
from vllm_pd_scheduler.health import StateLog
from vllm_pd_scheduler.models import By, InstanceRole, InstanceState, PDInstance
from vllm_pd_scheduler.records.events import Events
from vllm_pd_scheduler.telemetry import Telemetry

D = InstanceRole.DECODE


class StateLogTest(unittest.TestCase):
    def setUp(self) -> None:
        self.registry = Registry(HealthPolicy(breaker=BreakerPolicy(failures=1)))
        self.telemetry = Telemetry()
        self.events = Events(lambda: 0.0)
        StateLog(self.registry, self.telemetry, self.events)
        self.d1, self.d2, self.d3 = (self.add(f"d{n}", f"10.0.0.{n}") for n in range(1, 4))

    def add(self, name: str, host: str) -> Endpoint:
        endpoint = self.registry.add(PDInstance(name, D, host, 80))
        self.registry.probed(endpoint, None)
        return endpoint

    def told(self, call: Callable[..., object], *arguments: object) -> list[str]:
        """The lines of one call, at the default level."""
        with self.assertLogs("vllm_pd_scheduler", logging.INFO) as logs:
            logging.getLogger("vllm_pd_scheduler").info("-")  # assertLogs wants one line at least
            call(*arguments)
        return [f"{record.levelname} {record.getMessage()}" for record in logs.records[1:]]

    def test_probes(self) -> None:
        new = self.registry.add(PDInstance("new", D, "10.0.0.9", 80))
        for problem, lines in (
            ("connection refused", ["WARNING new is unhealthy: connection refused"]),
            ("connection refused", []),
            (None, ["INFO new is healthy"]),
            (None, []),
            ("no answer", []),  # one is not enough
            ("no answer", ["WARNING new is unhealthy: no answer"]),
        ):
            self.assertEqual(self.told(self.registry.probed, new, problem), lines)

    def test_an_ejection_its_trial_and_its_end(self) -> None:
        failed, probed, d2 = self.registry.ends.failed, self.registry.probed, self.d2
        for call, arguments, lines in (
            (failed, (d2, "decode: reset", 0.0), ["WARNING d2 is ejected: decode: reset"]),
            (probed, (d2, None, 0.5), []),  # its pause is not over
            (probed, (d2, None, 1.0), ["INFO d2 is on trial: ejected: decode: reset"]),
            (failed, (d2, "decode: timeout", 2.0), ["WARNING d2 is ejected: decode: timeout"]),
            (probed, (d2, None, 9.0), ["INFO d2 is on trial: ejected: decode: timeout"]),
            (self.registry.ends.succeeded, (d2,), ["INFO d2 is healthy"]),
        ):
            self.assertEqual(self.told(call, *arguments), lines)
        self.assertEqual(self.counted("d2"), {"ejected": 2, "trial": 2, "healthy": 2})

    def test_one_that_is_ejected_and_then_dies(self) -> None:
        self.told(self.registry.ends.failed, self.d2, "decode: connect", 0.0)
        self.assertEqual(self.told(self.registry.probed, self.d2, "gone", 0.5), [])
        lines = self.told(self.registry.probed, self.d2, "gone", 0.6)
        self.assertEqual(lines, ["WARNING d2 is unhealthy: gone"])

    def test_one_that_hung_and_runs_again(self) -> None:
        probed, d2 = self.registry.probed, self.d2
        for call, arguments, lines, why in (
            (probed, (d2, "no answer", 0.0), [], "no answer"),
            (probed, (d2, "no answer", 0.1), ["WARNING d2 is unhealthy: no answer"], "no answer"),
            (self.registry.ends.failed, (d2, "prefill: hung", 0.2), [], "no answer"),
            (probed, (d2, "no answer", 0.3), [], "no answer"),
            (
                probed,
                (d2, None, 9.0),
                ["WARNING d2 is on trial: ejected: prefill: hung"],
                "ejected: prefill: hung",
            ),
            (self.registry.ends.succeeded, (d2,), ["INFO d2 is healthy"], ""),
        ):
            self.assertEqual(self.told(call, *arguments), lines)
            self.assertEqual(reason(d2), why)

    def test_the_last_one_that_fails_is_tried_again_at_once(self) -> None:
        for name in ("d1", "d3"):
            self.registry.drain(name)
        self.registry.policy = HealthPolicy(max_ejected_share=1.0)
        lines = self.told(self.registry.ends.failed, self.d2, "decode: status", 0.0)
        self.assertEqual(lines, ["WARNING d2 is on trial: ejected: decode: status"])

    def test_a_drain_and_its_end(self) -> None:
        draining, drained = "INFO d1 is draining", "INFO d1 is drained: nothing that was sent there is left"
        self.assertEqual(self.told(self.registry.drain, "d1"), [draining, drained])
        self.assertEqual(self.told(self.registry.drain, "d1"), [])
        self.assertEqual(self.told(self.registry.undrain, "d1"), ["INFO d1 is healthy"])
        running = self.registry.work.reserve(self.d1)
        self.assertEqual(self.told(self.registry.drain, "d1"), [draining])
        self.assertEqual(self.told(self.registry.probed, self.d1, None), [])
        running.release()
        self.assertEqual(self.told(self.registry.probed, self.d1, None), [drained])
        self.assertEqual(self.told(self.registry.probed, self.d1, None), [])
        self.assertEqual(self.told(self.registry.undrain, "d1"), ["INFO d1 is healthy"])
        new = self.registry.add(PDInstance("new", D, "10.0.0.9", 80))
        self.registry.drain(new.id)
        self.assertEqual(self.told(self.registry.undrain, "new"), ["INFO new is starting"])

    def test_a_restart(self) -> None:
        self.assertEqual(self.told(self.registry.started, self.d1, 1.0), [])
        self.assertEqual(self.told(self.registry.started, self.d1, 2.0), ["WARNING d1 was restarted"])
        self.registry.ends.failed(self.d1, "decode: reset", 0.0)
        self.assertEqual(
            self.told(self.registry.started, self.d1, 3.0), ["WARNING d1 was restarted", "INFO d1 is healthy"]
        )

    def test_where_a_name_leads(self) -> None:
        new = self.registry.add(PDInstance("new", D, "vllm-0", 80))
        self.assertEqual(self.told(self.registry.resolved, new, "10.1.0.1"), ["INFO new is at 10.1.0.1:80"])
        self.assertEqual(self.told(self.registry.resolved, new, "10.1.0.1"), [])
        self.assertEqual(
            self.told(self.registry.resolved, new, "fd00::1"),
            ["INFO new is at [fd00::1]:80, no longer at 10.1.0.1:80"],
        )

    def test_those_that_come_and_go(self) -> None:
        self.assertEqual(self.told(self.registry.remove, "d1"), ["INFO d1 was removed"])
        self.assertEqual(
            self.told(self.registry.add, PDInstance("d1", D, "10.0.0.1", 80)),
            ["INFO d1 was added: decode, 10.0.0.1:80"],
        )

    def test_who_caused_each(self) -> None:
        admin = f"{By.ADMIN} 192.0.2.1"
        lines = self.told(self.registry.drain, "d3", admin)
        self.assertEqual(lines[0], "INFO d3 is draining (by admin 192.0.2.1)")
        self.registry.undrain("d3", admin)
        self.registry.ends.failed(self.d2, "decode: reset", 0.0)
        self.registry.probed(self.d2, None, 1.0)
        self.registry.ends.succeeded(self.d2)
        self.registry.started(self.d2, 1.0)
        self.registry.started(self.d2, 2.0)
        self.registry.remove("d2", admin)
        told = [(event.by, event.subject, event.text) for event in self.events.after(0)]
        self.assertEqual(
            told[:2], [("start", "d1", "d1 was added: decode, 10.0.0.1:80"), ("probe", "d1", "d1 is healthy")]
        )
        self.assertEqual(
            told[6:],
            [
                (admin, "d3", "d3 is draining"),
                (admin, "d3", "d3 is drained: nothing that was sent there is left"),
                (admin, "d3", "d3 is healthy"),
                ("request", "d2", "d2 is ejected: decode: reset"),
                ("probe", "d2", "d2 is on trial: ejected: decode: reset"),
                ("request", "d2", "d2 is healthy"),
                ("probe", "d2", "d2 was restarted"),
                (admin, "d2", "d2 was removed"),
            ],
        )

    def counted(self, name: str) -> dict[str, int]:
        page = self.telemetry.prometheus
        found = {}
        for state in (*InstanceState, "ejected", "trial"):
            labels = {"instance": name, "role": "decode", "state": str(state)}
            value = page.get_sample_value("pd_scheduler_instance_state_changes_total", labels)
            if value:
                found[str(state)] = int(value)
        return found


if __name__ == "__main__":
    unittest.main()
