"""The queue when the scheduler is to end, and what it counts of those in it."""

import unittest

from vllm_pd_scheduler.admission.dispatcher import Dispatcher
from vllm_pd_scheduler.admission.queue import Ticket
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.fleet.registry import Registry
from vllm_pd_scheduler.models import PD_ROLES, InstanceRole, PDInstance
from vllm_pd_scheduler.request.context import RequestContext
from vllm_pd_scheduler.request.errors import Reject
from vllm_pd_scheduler.scheduler import Scheduler

P, D = InstanceRole.PREFILL, InstanceRole.DECODE


class ClosingTest(unittest.TestCase):
    def setUp(self) -> None:
        self.registry = Registry()
        for role in PD_ROLES:
            endpoint = self.registry.add(PDInstance(role[0], role, "10.0.0.1", 80))
            self.registry.probed(endpoint, None)
        config = SchedulerConfig(max_in_flight_tokens=1)
        self.dispatcher = Dispatcher(Scheduler(config, self.registry))

    def submit(self, role: InstanceRole = P) -> Ticket:
        ticket = Ticket(RequestContext("/", prompt_tokens=1000.0), role, 10)
        self.dispatcher.submit(ticket, 0.0)
        return ticket

    def test_those_that_wait_when_it_closes_are_refused(self) -> None:
        served, *waiting = [self.submit() for _ in range(3)]
        self.dispatcher.close()
        for ticket in (*waiting, self.submit()):
            assert isinstance(ticket.outcome, Reject)
            self.assertEqual((ticket.outcome.status, ticket.outcome.reason), (503, "draining"))
        self.assertNotIsInstance(served.outcome, Reject)
        self.assertEqual(len(self.dispatcher.queue), 0)

    def test_whoever_need_not_wait_is_served_still(self) -> None:
        self.dispatcher.close()
        self.assertNotIsInstance(self.submit().outcome, Reject)

    def test_only_those_of_its_role_are_before_a_request(self) -> None:
        self.submit()
        self.assertFalse(self.submit().settled)
        self.assertTrue(self.submit(D).settled)

    def test_what_is_counted_of_the_queue(self) -> None:
        queue = self.dispatcher.queue
        _, *waiting = [self.submit() for _ in range(4)]
        self.assertAlmostEqual(queue.work, sum(ticket.cost for ticket in waiting))
        self.assertGreater(queue.work, 0.0)
        self.assertEqual((queue.waiting(P), queue.waiting(D), queue.bytes), (3, 0, 30))
        for ticket in waiting:
            self.dispatcher.withdraw(ticket)
        self.assertEqual((queue.waiting(P), queue.bytes, queue.work), (0, 0, 0.0))


if __name__ == "__main__":
    unittest.main()
