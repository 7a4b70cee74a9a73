"""Strategies by name: built-in, by dotted path, by entry point; and the example in ``docs/examples``."""

import re
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Any

from tests.support.given import give
from tests.support.strategies import REQUEST, build, ids
from vllm_pd_scheduler.config import ConfigError, SchedulerConfig, parse_config
from vllm_pd_scheduler.request.context import RequestContext
from vllm_pd_scheduler.strategies import Strategy, UnknownStrategy, load_strategy, strategy_names
from vllm_pd_scheduler.strategies.least_load import LeastLoad

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
ENTRY_POINTS = """[vllm_pd_scheduler.strategies]
sticky = sticky_model:StickyModel
broken = sticky_model:Nothing
wrong = os:getcwd
"""


class OnPath(unittest.TestCase):
    """Tests in which Python finds the modules of some directories."""

    def find_in(self, *directories: str | Path) -> None:
        before = sys.path[:]
        self.addCleanup(sys.path.__setitem__, slice(None), before)
        sys.path[:0] = map(str, directories)
        self.addCleanup(sys.modules.pop, "sticky_model", None)


class NamesTest(unittest.TestCase):
    def test_built_in_ones(self) -> None:
        self.assertEqual(strategy_names()[:3], ["round_robin", "least_load", "weighted"])
        self.assertIs(load_strategy("least_load"), LeastLoad)
        self.assertEqual(SchedulerConfig().strategy, "least_load")

    def test_what_is_none(self) -> None:
        cases = [
            ("fastest", r"^unknown strategy 'fastest'; choose one of round_robin, least_load, weighted"),
            ("", r"^unknown strategy ''"),
            ("os.path", r"^unknown strategy 'os.path'.*'package.module:Class'$"),
            (
                "no_such_module:S",
                r"^strategy 'no_such_module:S' cannot be loaded: No module named 'no_such_module'\. "
                r"Start with PYTHONPATH set to the directory that no_such_module is in, "
                rf"or install its package: `{re.escape(sys.executable)} -m pip install …`\. "
                r"Python has looked in .*"
                rf"{re.escape(str(Path(unittest.__file__).parents[1]))}",
            ),
            ("no.such.module:S", r"No module named 'no'\. Start with PYTHONPATH .* that no is in"),
            ("os:Nothing", r"^strategy 'os:Nothing' cannot be loaded: \S+/os\.py defines no 'Nothing'$"),
            (":", r"^strategy ':' cannot be loaded: "),
            ("os:getcwd", r"^'os:getcwd' is not a subclass of vllm_pd_scheduler.strategies.Strategy$"),
            ("builtins:object", r"is not a subclass of"),
        ]
        for name, pattern in cases:
            with self.subTest(name), self.assertRaisesRegex(UnknownStrategy, pattern):
                load_strategy(name)

    def test_a_strategy_without_score_says_so(self) -> None:
        class Unfinished(Strategy):
            pass

        _, endpoints = build(None)
        with self.assertRaisesRegex(NotImplementedError, "Unfinished defines neither"):
            Unfinished(SchedulerConfig()).rank(endpoints, REQUEST, 1)


class OwnStrategyTest(OnPath):
    def test_by_dotted_path_from_the_configuration(self) -> None:
        self.find_in(EXAMPLES)
        raw = {
            "strategy": "sticky_model:StickyModel",
            "prefill_instances": [{"id": "p0", "host": "h", "port": 1}],
            "decode_instances": [{"id": "d0", "host": "h", "port": 2}],
        }
        self.assertEqual(parse_config(raw).strategy, "sticky_model:StickyModel")
        with self.assertRaisesRegex(ConfigError, "strategy: strategy 'sticky_model:Stick' cannot be loaded"):
            parse_config({**raw, "strategy": "sticky_model:Stick"})

    def test_the_one_in_the_documentation(self) -> None:
        text = (EXAMPLES.parent / "strategies.md").read_text(encoding="utf-8")
        found: dict[str, Any] = {}
        exec(text.split("```python\n")[1].split("```")[0], found)
        strategy = found["CachedThenFree"](SchedulerConfig())
        self.assertTrue(strategy.reads_prefixes)
        _, endpoints = build({"kv_usage": 0.5}, {"kv_usage": 0.2}, {"kv_usage": 0.9})
        request = RequestContext("/")
        give(request, _cached={endpoints[2].holder: 4})
        self.assertEqual(ids(strategy.rank(endpoints, request, 3)), ["d2", "d1", "d0"])

    def test_by_entry_point(self) -> None:
        directory = Path(self.enterContext(tempfile.TemporaryDirectory()))
        metadata = directory / "sticky_model-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: sticky-model\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
        self.find_in(directory, EXAMPLES)
        self.assertEqual(strategy_names()[-3:], ["broken", "sticky", "wrong"])
        self.assertEqual(load_strategy("sticky").__name__, "StickyModel")
        with self.assertRaisesRegex(UnknownStrategy, "strategy 'broken' cannot be loaded: .*Nothing"):
            load_strategy("broken")
        with self.assertRaisesRegex(UnknownStrategy, "'wrong' is not a subclass"):
            load_strategy("wrong")
        with self.assertRaisesRegex(UnknownStrategy, "choose one of .*slo, broken, sticky, wrong,"):
            load_strategy("stick")

    def test_a_module_that_fails_on_import(self) -> None:
        directory = Path(self.enterContext(tempfile.TemporaryDirectory()))
        (directory / "broken_strategy.py").write_text("1 / 0\n")
        self.find_in(directory)
        with self.assertRaisesRegex(UnknownStrategy, "cannot be loaded: ZeroDivisionError: division by zero"):
            load_strategy("broken_strategy:S")


class StickyModelTest(OnPath):
    def setUp(self) -> None:
        self.find_in(EXAMPLES)
        self.strategy = load_strategy("sticky_model:StickyModel")(SchedulerConfig())
        self.registry, self.endpoints = build({"running": 9}, {"running": 3}, {"running": 6})

    def rank(self, model: str, count: int = 3) -> list[str]:
        return ids(self.strategy.rank(self.endpoints, RequestContext("/", model), count))

    def test_a_model_stays_at_home(self) -> None:
        for model in ("llama", "qwen", "adapter-7"):
            home = self.rank(model, 1)
            for _ in range(20):
                self.registry.work.reserve(self.registry.get(home[0]))
                self.assertEqual(self.rank(model, 1), home)

    def test_models_are_spread(self) -> None:
        homes = {self.rank(f"adapter-{number}", 1)[0] for number in range(30)}
        self.assertEqual(homes, {"d0", "d1", "d2"})

    def test_the_others_follow_by_load(self) -> None:
        for number in range(10):
            home, *rest = self.rank(f"adapter-{number}")
            by_load = ["d1", "d2", "d0"]
            by_load.remove(home)
            self.assertEqual(rest, by_load)

    def test_only_the_models_of_an_instance_that_left_move(self) -> None:
        models = [f"adapter-{number}" for number in range(30)]
        before = {model: self.rank(model, 1)[0] for model in models}
        gone = self.endpoints.pop()
        for model in models:
            now = self.rank(model, 1)[0]
            if before[model] != gone.id:
                self.assertEqual(now, before[model])


if __name__ == "__main__":
    unittest.main()
