"""The state file: what is kept of the admin's changes, and what becomes of a file that does not fit."""

import asyncio
import contextlib
import json
import os
import stat
import sys
import tempfile
import unittest
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any
from unittest import mock

from hypothesis import given
from hypothesis import strategies as st

from vllm_pd_scheduler.admin.changes import AdminChanges
from vllm_pd_scheduler.admin.moves import move
from vllm_pd_scheduler.admin.saved_changes import (
    AS_CONFIGURED,
    AdminState,
    SavedInstance,
    Steered,
    difference,
)
from vllm_pd_scheduler.admin.state_file import StateError, read_state, write_state
from vllm_pd_scheduler.config import ConfigError, SchedulerConfig, parse_config
from vllm_pd_scheduler.fleet.registry import DuplicateInstance, UnknownInstance
from vllm_pd_scheduler.models import PD_ROLES, InstanceRole, PDInstance
from vllm_pd_scheduler.router import PDRouter

P, D = InstanceRole.PREFILL, InstanceRole.DECODE
P0 = {"id": "p0", "host": "10.0.0.1", "port": 8100}
D0 = {"id": "d0", "host": "10.0.0.2", "port": 8200}
D1 = {"id": "d1", "host": "10.0.0.3", "port": 8200}
LOGGER = "vllm_pd_scheduler.admin"


def config(**changes: Any) -> SchedulerConfig:
    return parse_config({"prefill_instances": [P0], "decode_instances": [D0, D1], **changes})


def saved(role: InstanceRole = D, **entry: Any) -> SavedInstance:
    return SavedInstance.model_validate_json(json.dumps({"role": role, **entry}))


NEW = saved(id="d2", host="10.0.0.4", port=8200)


class Case(unittest.TestCase):
    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = Path(directory.name)
        self.path = self.directory / "state.json"
        self.aside = self.directory / "state.json.corrupt"

    def start(self, **changes: Any) -> tuple[PDRouter, AdminChanges]:
        """Do what a scheduler does when it starts."""
        router = PDRouter(config(state_file=str(self.path), **changes))
        kept = AdminChanges(router)
        kept.restore()
        return router, kept

    def warnings(self, **changes: Any) -> list[str]:
        """Start, and return the warnings of that."""
        with self.assertLogs(LOGGER, "WARNING") as logged:
            self.start(**changes)
        return [record.getMessage() for record in logged.records]


def ids(router: PDRouter) -> set[str]:
    return {instance.instance_id for instance in router.get_instances()}


def snapshot(router: PDRouter, added: list[SavedInstance]) -> AdminState:
    return difference(Steered.of(router, added), router.config)


def rewrite(router: PDRouter, kept: AdminChanges) -> None:
    """Have the file written without a change."""
    asyncio.run(kept.use(router.scheduler.strategies.names))


class SnapshotTest(unittest.TestCase):
    def test_no_change_is_nothing(self) -> None:
        self.assertEqual(snapshot(PDRouter(config()), []), AdminState(version=1))

    def test_each_change(self) -> None:
        router = PDRouter(config())
        router.scheduler.strategies.use("weighted")
        router.drain_instance("d0")
        router.unregister_instance("d1")
        router.register_instance(router.config.instance(NEW.role, NEW))
        found = snapshot(router, [NEW])
        self.assertEqual((found.strategy, found.drained, found.added), ("weighted", ["d0"], [NEW]))
        self.assertEqual(found.removed, [saved(**D1)])

    def test_strategies_by_role(self) -> None:
        configured = {"strategy": "least_load", "decode_strategy": "weighted"}
        for changes, kept in (
            ({}, {}),
            ({P: "slo"}, {"prefill_strategy": "slo"}),
            ({D: "slo"}, {"decode_strategy": "slo"}),
            ({D: "least_load"}, {"decode_strategy": "least_load"}),
            ({P: "slo", D: "slo"}, {"strategy": "slo"}),
            ({P: "weighted", D: "slo"}, {"prefill_strategy": "weighted", "decode_strategy": "slo"}),
        ):
            with self.subTest(changes):
                router, again = PDRouter(config(**configured)), PDRouter(config(**configured))
                router.scheduler.strategies.use_each(changes)
                state = snapshot(router, [])
                self.assertEqual(state, AdminState(version=1, **kept))
                self.assertEqual(move(AS_CONFIGURED, state, again, "test"), ([], []))
                self.assertEqual(again.scheduler.strategies.names, router.scheduler.strategies.names)

    def test_a_shadow(self) -> None:
        for configured, used, kept in (
            (None, None, None),
            (None, "slo", "slo"),
            ("slo", "slo", None),
            ("slo", "weighted", "weighted"),
            ("slo", None, ""),
        ):
            with self.subTest(configured=configured, used=used):
                settings = config(shadow_strategy=configured)
                router, again = PDRouter(settings), PDRouter(settings)
                router.scheduler.strategies.use_shadow(used)
                state = snapshot(router, [])
                self.assertEqual(state, AdminState(version=1, shadow_strategy=kept))
                self.assertEqual(move(AS_CONFIGURED, state, again, "test"), ([], []))
                shadow = again.scheduler.strategies.shadow
                self.assertEqual(shadow and shadow.name, used)

    def test_a_change_that_is_undone_is_none(self) -> None:
        router = PDRouter(config())
        for strategy in ("weighted", "least_load"):
            router.scheduler.strategies.use(strategy)
        router.drain_instance("d0")
        router.undrain_instance("d0")
        router.unregister_instance("d1")
        again = saved(**D1)
        router.register_instance(router.config.instance(again.role, again))
        self.assertEqual(snapshot(router, [saved(**D1)]), AdminState(version=1))

    def test_what_others_registered_is_not_the_admins(self) -> None:
        router = PDRouter(config())
        router.register_instance(PDInstance("found", D, "10.0.0.9", 8200))
        router.drain_instance("found")
        self.assertEqual(snapshot(router, []), AdminState(version=1))

    def test_another_key_is_a_replacement(self) -> None:
        router = PDRouter(config())
        with mock.patch.dict(os.environ, {"PD_TEST_KEY": "sk-secret"}):
            other = saved(**D1, api_key={"env": "PD_TEST_KEY"})
            router.unregister_instance("d1")
            router.register_instance(router.config.instance(other.role, other))
            state = snapshot(router, [other])
            self.assertEqual((state.removed, state.added), ([saved(**D1)], [other]))
            again = PDRouter(config())
            self.assertEqual(move(AS_CONFIGURED, state, again, "test"), ([other], []))
        self.assertEqual(again.registry.get("d1").instance.api_key, "sk-secret")
        self.assertNotIn("sk-secret", state.model_dump_json())


CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("use"), st.sampled_from(["round_robin", "least_load", "weighted"])),
        st.tuples(
            st.just("use_each"),
            st.dictionaries(st.sampled_from([P, D]), st.sampled_from(["round_robin", "least_load", "slo"])),
        ),
        st.tuples(st.just("shadow"), st.sampled_from([None, "round_robin", "slo"])),
        st.tuples(
            st.just("add"),
            st.builds(
                saved,
                role=st.sampled_from([P, D]),
                id=st.sampled_from(["p0", "d0", "d1", "x", "y"]),
                host=st.sampled_from(["10.0.0.1", "10.0.0.2", "10.0.0.3", "::1", "name.example"]),
                port=st.sampled_from([8100, 8200]),
            ),
        ),
        st.tuples(
            st.sampled_from(["drain", "undrain", "remove"]), st.sampled_from(["p0", "d0", "d1", "x", "y"])
        ),
    ),
    max_size=20,
)


def change(kept: AdminChanges, kind: str, value: Any) -> None:
    """Do one change as the admin interface does; one that is impossible changes nothing."""
    calls: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
        "use": lambda: kept.use(dict.fromkeys(PD_ROLES, value)),
        "use_each": lambda: kept.use(value),
        "shadow": lambda: kept.use_shadow(value),
        "drain": lambda: kept.drain(value),
        "undrain": lambda: kept.undrain(value),
        "add": lambda: kept.add(value),
        "remove": lambda: kept.remove(value),
    }
    with contextlib.suppress(DuplicateInstance, UnknownInstance):
        asyncio.run(calls[kind]())


def shape(router: PDRouter) -> Any:
    """All of a router that a restart must bring back."""
    fleet = {e.id: (e.instance, e.draining) for e in router.registry}
    shadow = router.scheduler.strategies.shadow
    return router.scheduler.strategies.names, shadow and shadow.name, fleet


class RoundTripTest(unittest.TestCase):
    @given(CHANGES)
    def test_any_changes_survive_a_restart(self, changes: list[tuple[str, Any]]) -> None:
        with tempfile.TemporaryDirectory() as directory, mock.patch("os.fsync"):
            settings = config(
                state_file=f"{directory}/state.json", decode_strategy="weighted", shadow_strategy="slo"
            )
            router = PDRouter(settings)
            kept = AdminChanges(router)
            for kind, value in changes:
                change(kept, kind, value)
            rewrite(router, kept)
            again = PDRouter(settings)
            restored = AdminChanges(again)
            with self.assertNoLogs(LOGGER, "WARNING"):
                restored.restore()
            self.assertEqual(shape(again), shape(router))
            before = Path(directory, "state.json").read_bytes()
            rewrite(again, restored)
            self.assertEqual(Path(directory, "state.json").read_bytes(), before)
            self.assertEqual(os.listdir(directory), ["state.json"])


class OvertakenTest(Case):
    """The configuration was changed while the scheduler was down."""

    def keep(self, **state: Any) -> None:
        write_state(self.path, AdminState(version=1, **state))

    def test_an_instance_that_the_configuration_has_elsewhere(self) -> None:
        self.keep(added=[saved(id="d1", host="10.0.0.7", port=8200)])
        (warning,) = self.warnings()
        self.assertIn(str(self.path), warning)
        self.assertIn("added: 'd1' at 10.0.0.7:8200: the id 'd1' is taken", warning)

    def test_an_address_that_is_taken(self) -> None:
        self.keep(added=[saved(**{**D1, "id": "x"})])
        self.assertIn("10.0.0.3:8200 is already the decode instance 'd1'", self.warnings()[0])

    def test_an_instance_that_the_configuration_has_too_by_now(self) -> None:
        self.keep(added=[saved(**D1)])
        with self.assertNoLogs(LOGGER, "WARNING"):
            router, kept = self.start()
        rewrite(router, kept)
        self.assertEqual(ids(router), {"p0", "d0", "d1"})
        self.assertEqual(read_state(self.path), AdminState(version=1))

    def test_the_configurations_key_wins_for_an_instance_that_both_have(self) -> None:
        with mock.patch.dict(os.environ, {"KEY_A": "a", "KEY_B": "b"}):
            self.keep(added=[saved(**D1, api_key={"env": "KEY_A"})])
            entry = {**D1, "api_key": {"env": "KEY_B"}}
            router, kept = self.start(decode_instances=[D0, entry])
            rewrite(router, kept)
            self.assertEqual(router.registry.get("d1").instance.api_key, "b")
            self.assertEqual(read_state(self.path), AdminState(version=1))

    def test_a_removed_instance_that_is_another_one_now(self) -> None:
        self.keep(removed=[saved(**D1)])
        moved = {**D1, "host": "10.0.0.8"}
        (warning,) = self.warnings(decode_instances=[D0, moved])
        self.assertIn("removed: 'd1' is the decode instance 10.0.0.8:8200 now: it stays", warning)

    def test_a_removed_instance_that_is_gone_is_no_matter(self) -> None:
        self.keep(removed=[saved(**D1)])
        with self.assertNoLogs(LOGGER, "WARNING"):
            router, _ = self.start(decode_instances=[D0])
        self.assertEqual(ids(router), {"p0", "d0"})

    def test_a_drain_of_nobody(self) -> None:
        self.keep(drained=["x", "d0"])
        with self.assertLogs(LOGGER, "WARNING") as logged:
            router, _ = self.start()
        self.assertIn("drained: no instance has the id 'x'", logged.output[0])
        self.assertTrue(router.registry.get("d0").draining, "the rest counts")

    def test_a_drain_and_a_removal_of_those_that_a_source_names_later(self) -> None:
        source = {"type": "dns", "role": "decode", "name": "decode.llm.svc", "port": 8000}
        found = [PDInstance(name, D, f"10.0.1.{n}", 8000) for n, name in enumerate(("d7", "d8", "d9"))]
        with self.assertNoLogs(LOGGER, "WARNING"):
            router, kept = self.start(discovery=[source])
            router.membership.update("dns", found)
            asyncio.run(kept.drain("d7"))
            asyncio.run(kept.remove("d8"))
            for _ in range(2):  # and a change while the source is silent loses nothing
                router = PDRouter(config(state_file=str(self.path), discovery=[source]))
                router.membership.expect("dns")
                kept = AdminChanges(router)
                kept.restore()
                rewrite(router, kept)
                asyncio.run(kept.drain("d0"))
            router.membership.update("dns", found)
        self.assertEqual(ids(router), {"p0", "d0", "d1", "d7", "d9"})
        drained = {endpoint.id for endpoint in router.registry if endpoint.draining}
        self.assertEqual(drained, {"d0", "d7"})
        router.membership.update("dns", [])
        router.membership.update("dns", found)
        self.assertIn("d8", ids(router), "it was named no more")

    def test_an_unknown_strategy(self) -> None:
        self.keep(strategy="gone")
        self.assertIn("strategy: unknown strategy 'gone'", self.warnings()[0])

    def test_one_that_cannot_be_used_leaves_the_others(self) -> None:
        self.keep(prefill_strategy="gone", decode_strategy="weighted", shadow_strategy="lost")
        with self.assertLogs(LOGGER, "WARNING") as logged:
            router, _ = self.start()
        self.assertEqual(router.scheduler.strategies.names, {P: "least_load", D: "weighted"})
        self.assertIn("prefill_strategy: unknown strategy 'gone'", logged.output[0])
        self.assertIn("shadow_strategy: unknown strategy 'lost'", logged.output[1])

    def test_a_file_of_a_time_with_one_strategy_for_both_roles(self) -> None:
        text = '{"version": 1, "strategy": "weighted", "removed": [], "added": [], "drained": ["d0"]}'
        self.path.write_text(text)
        router, kept = self.start()
        self.assertEqual(router.scheduler.strategies.names, {P: "weighted", D: "weighted"})
        rewrite(router, kept)
        self.assertEqual(json.loads(self.path.read_text()), json.loads(text))

    def test_a_dotted_path_runs_no_code(self) -> None:
        for key in ("strategy", "prefill_strategy", "decode_strategy", "shadow_strategy"):
            self.keep(**{key: "this:Strategy"})
            (warning,) = self.warnings()
            self.assertIn(f"{key}: 'this:Strategy' can be used only if the configuration names it", warning)
        self.assertNotIn("this", sys.modules)

    def test_a_dotted_path_that_the_configuration_names(self) -> None:
        name = "vllm_pd_scheduler.strategies.weighted:Weighted"
        router, kept = self.start(strategy=name)
        router.scheduler.strategies.use("round_robin")
        rewrite(router, kept)
        self.assertEqual(self.start(strategy=name)[0].scheduler.strategies.name, "round_robin")
        self.keep(strategy=name)
        self.assertEqual(self.start(strategy=name)[0].scheduler.strategies.name, name)

    def test_a_strategy_that_cannot_be_made(self) -> None:
        self.keep(strategy="weighted")
        with mock.patch("vllm_pd_scheduler.strategies.Weighted.__init__", side_effect=RuntimeError("odd")):
            self.assertIn(
                "strategy: strategy 'weighted' cannot be made: RuntimeError: odd", self.warnings()[0]
            )

    def test_a_key_that_is_gone(self) -> None:
        self.keep(added=[saved(**{**D1, "id": "x", "port": 1}, api_key={"env": "PD_TEST_GONE"})])
        expected = "added: 'x': api_key: environment variable PD_TEST_GONE is not set"
        self.assertIn(expected, self.warnings()[0])


class FileTest(Case):
    def test_none_is_kept_by_default(self) -> None:
        router = PDRouter(config())
        kept = AdminChanges(router)
        kept.restore()
        asyncio.run(kept.add(NEW))
        asyncio.run(kept.remove("d2"))
        self.assertEqual(os.listdir(self.directory), [])

    def test_the_first_start(self) -> None:
        with self.assertNoLogs(LOGGER):
            self.start()

    def test_it_is_the_owners_only_and_has_no_key(self) -> None:
        _, kept = self.start()
        with mock.patch.dict(os.environ, {"PD_TEST_KEY": "sk-secret"}):
            asyncio.run(
                kept.add(
                    NEW.model_copy(update={"api_key": saved(**D1, api_key={"env": "PD_TEST_KEY"}).api_key})
                )
            )
        self.assertEqual(stat.S_IMODE(self.path.stat().st_mode), 0o600)
        text = self.path.read_text()
        self.assertNotIn("sk-secret", text)
        self.assertEqual(json.loads(text)["added"][0]["api_key"], {"env": "PD_TEST_KEY"})

    def test_what_was_added_is_remembered_over_two_restarts(self) -> None:
        _, kept = self.start()
        asyncio.run(kept.add(NEW))
        for _ in range(2):
            router, kept = self.start()
            self.assertIn("d2", ids(router))
            rewrite(router, kept)

    def test_files_that_cannot_be_used(self) -> None:
        for content in (
            b"",
            b"{",
            b"\xff\xfe",
            b"null",
            b"[]",
            b"{}",
            b'{"version": 2}',
            b'{"version": 1, "pods": []}',
            b'{"version": 1, "drained": "d0"}',
            b'{"version": 1, "drained": ["\\ud800"]}',
            b'{"version": 1, "added": [{"id": "../x", "role": "decode", "host": "h", "port": 1}]}',
            b'{"version": 1, "added": [{"id": "x", "role": "both", "host": "h", "port": 1}]}',
            b"[" * 100_000,
            b'{"version": 1, "strategy": "weighted"',
        ):
            with self.subTest(content=content[:40]):
                self.path.write_bytes(content)
                (warning,) = self.warnings()
                self.assertRegex(warning, rf"^state_file {self.path}: [^:].*{self.aside} now")
                self.assertEqual(self.aside.read_bytes(), content)
                self.assertFalse(self.path.exists())

    def test_after_a_bad_file_changes_are_kept(self) -> None:
        self.path.write_bytes(b"{")
        with self.assertLogs(LOGGER, "WARNING"):
            _, kept = self.start()
        asyncio.run(kept.remove("d1"))
        self.assertEqual(ids(self.start()[0]), {"p0", "d0"})
        self.assertEqual(self.aside.read_bytes(), b"{")

    def test_a_file_that_cannot_be_read(self) -> None:
        self.path.write_bytes(b"{}")
        with (
            mock.patch.object(Path, "read_bytes", side_effect=PermissionError(13, "Permission denied")),
            self.assertRaisesRegex(StateError, "^cannot be read: Permission denied$"),
        ):
            read_state(self.path)


class ConfigTest(Case):
    def problem(self, state_file: Any) -> str:
        with self.assertRaises(ConfigError) as caught:
            config(state_file=state_file)
        (problem,) = caught.exception.problems
        return problem

    def test_a_directory_that_does_not_exist(self) -> None:
        self.assertEqual(
            self.problem(f"{self.directory}/no/state.json"),
            f"state_file: there is no directory {self.directory}/no",
        )

    def test_a_directory_that_is_not_writable(self) -> None:
        with mock.patch("os.access", return_value=False):  # root may write anywhere
            self.assertEqual(
                self.problem(str(self.path)), f"state_file: the directory {self.directory} is not writable"
            )

    def test_what_is_no_file(self) -> None:
        self.assertEqual(self.problem(str(self.directory)), f"state_file: {self.directory} is not a file")
        os.mkfifo(self.path)
        self.assertEqual(self.problem(str(self.path)), f"state_file: {self.path} is not a file")

    def test_no_path(self) -> None:
        for value in ("", "a\0b", 5, {"file": "x"}):
            self.assertRegex(self.problem(value), "^state_file: ")

    def test_a_name_alone_is_in_the_working_directory(self) -> None:
        self.assertEqual(config(state_file="state.json").state_file, "state.json")
