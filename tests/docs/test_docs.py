"""What the documentation says of names and defaults, against the code."""

import json
import os
import re
import unittest
from importlib.metadata import entry_points
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import typer.main
from benchmarks.routers import figures

from docs import generate_configuration, generate_performance
from tests.support.certificates import make_certificates
from tests.support.known_metrics import filled_router, real_metrics
from vllm_pd_scheduler.admin import AdminServer
from vllm_pd_scheduler.cli import app
from vllm_pd_scheduler.cli.llmd_flags import IGNORED, REFUSED
from vllm_pd_scheduler.config import SchedulerConfig, parse_config
from vllm_pd_scheduler.replay.peers import PEERS
from vllm_pd_scheduler.replay.variant import LOWER_BOUND
from vllm_pd_scheduler.request import headers
from vllm_pd_scheduler.request.path import PUBLIC_PATHS
from vllm_pd_scheduler.router import PDRouter
from vllm_pd_scheduler.sim.setups import NAMES
from vllm_pd_scheduler.strategies import ENTRY_POINT_GROUP, Strategy, strategy_names

ROOT = Path(__file__).parents[2]
READMES = ("README.md", "README.zh-CN.md")
"""The same text in two languages."""
TEXTS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("deploy/**/README.md"))
}
CONFIGURATION = "docs/configuration.md"
STRATEGIES = ("docs/strategies.md", "## Choose one")
COMMANDS = ("docs/cli.md", "## Commands")
ADMIN = ("docs/admin.md", "## Requests")
UNITS = {"MiB": 1 << 20, "GiB": 1 << 30}


def section(document: str, heading: str) -> str:
    """A section's text, without those below other headings of its level or above."""
    level = heading.partition(" ")[0]
    _, found, rest = f"\n{TEXTS[document]}".partition(f"\n{heading}\n")
    assert found, f"{document} has no {heading}"
    return re.split(rf"\n#{{1,{len(level)}}} ", rest)[0]


def rows(text: str) -> list[list[str]]:
    """The cells of all rows of all tables, heads left out."""
    lines = text.splitlines()
    found = []
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("|") and not line.startswith("|-") and not after.startswith("|-"):
            found.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return found


def quoted(text: str) -> list[str]:
    """What stands in backticks, blocks of code left out."""
    return re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def default(text: str) -> Any:
    """A default as a table has it: JSON, a word, a size, or a dash for none."""
    bare = text.strip("` ")
    size, _, unit = bare.partition(" ")
    if unit in UNITS:
        return int(size) * UNITS[unit]
    if bare == "\N{EN DASH}":
        return None
    try:
        return json.loads(bare)
    except ValueError:
        return bare


class SettingsTest(unittest.TestCase):
    def test_the_page_is_up_to_date(self) -> None:
        message = "docs/configuration.md is stale: run `make docs`"
        self.assertEqual(TEXTS[CONFIGURATION], generate_configuration.page(), message)

    def test_every_setting_is_in_one_group(self) -> None:
        grouped = [key for group in generate_configuration.GROUPS for key in group.keys]
        message = "GROUPS in docs/generate_configuration.py must have each key of the configuration once"
        self.assertEqual(sorted(grouped), sorted(SchedulerConfig.model_fields), message)

    def test_every_setting_has_one_row_with_its_default_and_what_it_does(self) -> None:
        documented = []
        for key, kind, stated, text in rows(TEXTS[CONFIGURATION].partition("\n## Objects\n")[0]):
            (name,) = quoted(key)
            documented.append(name)
            with self.subTest(name):
                self.assertTrue(kind and text)
                found, real = default(re.sub(r" \(.* MiB\)$", "", stated)), getattr(SchedulerConfig(), name)
                self.assertEqual(found, real or None if isinstance(real, list | dict) else real)
                self.assertIs(type(found), type(real) if real not in ([], {}) else type(None))
        self.assertEqual(sorted(documented), sorted(SchedulerConfig.model_fields))

    def test_every_example_is_accepted(self) -> None:
        """With the files and the variable that it names."""
        with TemporaryDirectory() as folder, patch.dict(os.environ, {"VLLM_API_KEY": "key"}):
            made = make_certificates(Path(folder))
            for secret in ("pd-admin", "valkey"):
                (Path(folder) / secret).write_text("token")
            (Path(folder) / "instances.yaml").write_text("{}")
            files = {
                "/etc/pd/fleet-ca.pem": made.ca,
                "/etc/pd/scheduler.pem": made.server["cert"],
                "/etc/pd/scheduler.key": made.server["key"],
                "/run/secrets": folder,
                "/etc/pd/instances.yaml": f"{folder}/instances.yaml",
                "10.0.0.": "vllm.internal.n",  # certificates are not checked for addresses
            }
            least, *examples = re.findall(r"```json\n(.*?)```", TEXTS[CONFIGURATION], re.DOTALL)
            self.assertEqual(len(examples), len(generate_configuration.GROUPS))
            for example in (least, *examples):
                for named, real in files.items():
                    least, example = least.replace(named, real), example.replace(named, real)
                with self.subTest(example):
                    parse_config({**json.loads(least), **json.loads(example)})

    def test_every_example_shows_keys_of_its_group(self) -> None:
        for group in generate_configuration.GROUPS:
            self.assertTrue(set(group.example) & set(group.keys), group.title)

    def test_security_lists_the_public_paths(self) -> None:
        (listed,) = re.findall(
            r"By default (.*?)\.\n\n", section("docs/security.md", "## Public paths"), re.DOTALL
        )
        self.assertEqual(quoted(listed), list(PUBLIC_PATHS))

    def test_overload_has_the_same_defaults(self) -> None:
        settings = [row for row in rows(section("docs/reliability.md", "## Overload")) if len(row) == 3]
        self.assertGreater(len(settings), 5)
        for keys, defaults, _ in settings:
            names = quoted(keys)
            for name, text in zip(
                names, defaults.split(",") * (len(names) == 1) or defaults.split(","), strict=True
            ):
                with self.subTest(name):
                    self.assertEqual(default(text), getattr(SchedulerConfig(), name))


class PerformanceTest(unittest.TestCase):
    def test_the_page_has_the_figures_of_the_last_release(self) -> None:
        text = TEXTS["docs/performance.md"]
        made = generate_performance.page(text, figures.load(figures.LAST_RELEASE))
        self.assertEqual(text, made, "stale: run `python -m docs.generate_performance`")


class StrategiesTest(unittest.TestCase):
    def test_the_table_has_all(self) -> None:
        added = {entry.name for entry in entry_points(group=ENTRY_POINT_GROUP)}
        names = [quoted(row[0])[0] for row in rows(section(*STRATEGIES))]
        self.assertEqual(sorted(names), sorted(set(strategy_names()) - added))

    def test_the_examples_are_strategies(self) -> None:
        for document in TEXTS:
            for code in re.findall(r"```python\n(.*?)```", TEXTS[document], re.DOTALL):
                if "(Strategy)" in code:
                    with self.subTest(document):
                        made: dict[str, Any] = {}
                        exec(code, made)
                        own = [v for v in made.values() if isinstance(v, type) and v is not Strategy]
                        self.assertTrue(own and all(issubclass(each, Strategy) for each in own))


class MetricsTest(unittest.TestCase):
    def setUp(self) -> None:
        self.real = real_metrics(filled_router())

    def test_every_metric_has_a_row_with_its_type_and_labels(self) -> None:
        table = [row for row in rows(TEXTS["docs/metrics.md"]) if len(row) == 4]
        self.assertEqual({quoted(row[0])[0]: (row[1], quoted(row[2])) for row in table}, self.real)

    def test_no_other_is_named_anywhere(self) -> None:
        for document, text in TEXTS.items():
            found = re.findall(r"\bpd_[a-z_]+[a-z]\b(?!\.[a-z])", text)
            self.assertLessEqual(set(found), set(self.real), document)

    def test_every_reason_has_a_row(self) -> None:
        files = (ROOT / "extproc/vllm_pd_scheduler").rglob("*.py")
        code = "".join(file.read_text(encoding="utf-8") for file in files if file.name != "errors.py")
        calls = re.findall(r"(?:\breject|_refusal|\bReject)\([^()]*(?:\([^()]*\)[^()]*)*\)", code)
        reasons = {name for call in calls for name in re.findall(r'"([a-z_0-9]+)"', call)}
        table = rows(section("docs/metrics.md", "## Reasons"))
        self.assertEqual({name for row in table for name in quoted(row[0])}, reasons)


class HeadersTest(unittest.TestCase):
    def test_each_is_documented_and_no_other(self) -> None:
        real = {v for v in vars(headers).values() if isinstance(v, str) and v.startswith("x-pd-")}
        named = {name for text in TEXTS.values() for name in re.findall(r"\bx-pd-[a-z-]+[a-z]", text)}
        self.assertEqual(named, real)


class CommandsTest(unittest.TestCase):
    def setUp(self) -> None:
        group: Any = typer.main.get_command(app)
        self.options = {
            name: {option for each in command.params for option in each.opts if option.startswith("-")}
            - {"--help"}
            for name, command in group.commands.items()
            if not command.hidden
        }

    def test_every_command_has_a_row_and_its_options_exist(self) -> None:
        seen = set()
        for row in rows(section(*COMMANDS)):
            words = re.findall("[a-z-]+", row[0].partition("scheduler")[2])
            name = next(word for word in words if word in self.options)
            seen.add(name)
            self.assertLessEqual(set(re.findall(r"--[a-z-]+", row[0])), self.options[name])
        self.assertEqual(seen, set(self.options))

    def test_every_option_has_a_row(self) -> None:
        named = {name for row in rows(section("docs/cli.md", "## Options")) for name in quoted(row[0])}
        others = {name: found for name, found in self.options.items() if name not in ("replay", "epp")}
        self.assertEqual(named, set().union(*others.values()))

    def test_replay_has_a_row_for_each_option(self) -> None:
        text = section("docs/replay.md", "## Options")
        self.assertEqual({name for row in rows(text) for name in quoted(row[0])}, self.options["replay"])
        self.assertLessEqual({*NAMES, *PEERS, LOWER_BOUND}, set(quoted(text)))

    def test_epp_has_a_row_for_each_flag_and_for_each_that_is_not_followed(self) -> None:
        table = rows(section("docs/llm-d.md", "## Flags"))
        named = [name for row in table for name in quoted(row[0])]
        ignored = [f"--{name}" for name in (*IGNORED, *REFUSED)]
        self.assertEqual(sorted(named), sorted([*self.options["epp"], *ignored]))


class AdminTest(unittest.TestCase):
    def test_every_route_has_a_row(self) -> None:
        server = AdminServer(PDRouter(SchedulerConfig()), is_ready=lambda: True)
        real = {
            (route.method, route.resource.canonical)
            for route in server.application().router.routes()
            if route.method != "HEAD" and route.resource is not None
        }
        cells = " ".join(row[0] for row in rows(section(*ADMIN)))
        found = re.findall(r"(GET|PUT|POST|DELETE) (/[a-z{}./-]*)", cells)
        self.assertEqual(set(found), real)


class PlacesTest(unittest.TestCase):
    def test_every_module_is_in_the_architecture(self) -> None:
        named = set(quoted(section("docs/architecture.md", "## Rooms")))
        package = ROOT / "extproc/vllm_pd_scheduler"
        rooms = {f"{path.name}/" for path in package.iterdir() if (path / "__init__.py").exists()}
        modules = {path.name for path in package.rglob("*.py")} - {"__init__.py", "__main__.py"}
        self.assertLessEqual(rooms | modules, named)

    def test_every_page_is_in_the_index_and_in_the_menu(self) -> None:
        menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
        for page in (ROOT / "docs").rglob("*.md"):
            path = page.relative_to(ROOT / "docs")
            parent = path.parent.with_suffix(".md") if path.parent.name else Path("index.md")
            with self.subTest(str(path)):
                self.assertIn(f": {path}\n", menu)
                named = TEXTS[f"docs/{parent}"]
                self.assertTrue(path.name in ("index.md", "reference.md") or str(path) in named)

    def test_both_readmes_have_the_same_sections_and_links(self) -> None:
        found = []
        for name in READMES:
            links = {link for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name]) if link not in READMES}
            found.append((len(re.findall("^## ", TEXTS[name], re.MULTILINE)), links))
        self.assertEqual(*found)

    def test_the_figures_of_both_readmes_are_those_of_the_page(self) -> None:
        found = []
        for name in READMES:
            table = next(
                part for part in TEXTS[name].split("\n\n") if "make bench" in part and "|---" in part
            )
            found.append(set(re.findall(r"\d+\.\d+", table)))
        self.assertEqual(*found)
        self.assertGreater(len(found[0]), 5)
        self.assertLessEqual(found[0], set(re.findall(r"\d+\.\d+", TEXTS["docs/figures.md"])))

    def test_links_lead_somewhere(self) -> None:
        for document, text in TEXTS.items():
            for link in re.findall(r"\]\(([^)\s]+)\)", text):
                path, _, anchor = link.partition("#")
                target = (ROOT / document).parent / path if path else ROOT / document
                with self.subTest(document, link=link):
                    self.assertTrue("://" in link or target.exists())
                    if anchor and "://" not in link:
                        self.assertIn(anchor, anchors(target.read_text(encoding="utf-8")))

    def test_the_tests_that_are_named_exist(self) -> None:
        tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
        files = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
        for document, text in TEXTS.items():
            for name in set(re.findall(r"`(test_\w+)", text)):
                with self.subTest(document, test=name):
                    self.assertTrue(name in files or re.search(rf"def {name}\b", tests))


def anchors(text: str) -> set[str]:
    """Those that GitHub gives headings."""
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


if __name__ == "__main__":
    unittest.main()
