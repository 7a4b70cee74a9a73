"""Configuration: what holds where nothing is given."""

import json
from pathlib import Path
from typing import Any

from tests.support.config import ConfigCase, fleet
from vllm_pd_scheduler.config import (
    ConfigError,
    SchedulerConfig,
    load_config,
    parse_config,
)
from vllm_pd_scheduler.models import InstanceRole

EXAMPLE = Path(__file__).parents[2] / "scheduler_config.example.json"


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
