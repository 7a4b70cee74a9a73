"""Files with instances: what they may hold, how they are replaced, and what a bad one does."""

import json
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.support.config import fleet as configured
from tests.support.waiting import until
from vllm_pd_scheduler.config import ConfigError, load_config, load_instances, parse_config
from vllm_pd_scheduler.discovery import watch
from vllm_pd_scheduler.discovery.files import source_of
from vllm_pd_scheduler.discovery.sources import Sources
from vllm_pd_scheduler.discovery.watch import WatchedFile
from vllm_pd_scheduler.models import InstanceRole
from vllm_pd_scheduler.router import PDRouter

YAML = """\
prefill_instances:
  - {id: p1, host: 10.0.1.1, port: 8100}
decode_instances:
  - id: d1
    host: 10.0.1.2
    port: 8200
  - {id: d2, host: 10.0.1.3, port: 8200}
"""


def text(*names: str) -> str:
    """A file with these D."""
    entries = [{"id": name, "host": f"10.0.2.{n}", "port": 8200} for n, name in enumerate(names)]
    return json.dumps({"decode_instances": entries})


class TestContent:
    def problems(self, path: Path, content: str | bytes) -> list[str]:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        with pytest.raises(ConfigError) as caught:
            load_instances(path)
        return caught.value.problems

    def test_yaml_and_json_are_the_same(self, tmp_path: Path) -> None:
        (tmp_path / "fleet.yaml").write_text(YAML)
        found = load_instances(tmp_path / "fleet.yaml")
        (tmp_path / "fleet.json").write_text(found.model_dump_json())
        assert load_instances(tmp_path / "fleet.json") == found
        assert [(role, item.id) for role, _, item in found.listed()] == [
            (InstanceRole.PREFILL, "p1"),
            (InstanceRole.DECODE, "d1"),
            (InstanceRole.DECODE, "d2"),
        ]

    def test_an_empty_list_is_an_empty_set(self, tmp_path: Path) -> None:
        (tmp_path / "fleet.json").write_text("{}")
        assert list(load_instances(tmp_path / "fleet.json").listed()) == []

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            ("", "must be an object, not null"),
            ("a: [", "line 2, column 1: not valid YAML: did not find expected node content"),
            ("\tx", "line 1, column 1: not valid YAML: found character that cannot start any token"),
            (
                "decode_instances: []\ndecode_instances: []",
                "line 2: decode_instances: this key is given twice",
            ),
            ("decode_instances: !!python/object:os.system {}", "line 1, column 19: not valid YAML"),
            ("decode_instances: 2026-13-45", "not valid YAML: month must be in 1..12"),
            ("? [1]\n: 2", "not valid YAML: found unhashable key"),
            (b"a: \xff", "is not UTF-8 encoded YAML"),
            ("decode: []", "decode: unknown key"),
            ("decode_instances: [{id: d, host: h, port: '8'}]", "decode_instances[0].port: must be"),
            ("decode_instances: &a [*a]", "decode_instances"),
            ("[" * 100_000, ""),
        ],
    )
    def test_what_yaml_is_refused(self, tmp_path: Path, content: str | bytes, expected: str) -> None:
        problem, *_ = self.problems(tmp_path / "f.yaml", content)
        assert expected in problem

    def test_every_problem_at_once(self, tmp_path: Path) -> None:
        content = YAML.replace("id: d2", "id: p1").replace("10.0.1.3", "10.0.1.2")
        assert self.problems(tmp_path / "f.yml", content) == [
            "decode_instances[1].id: 'p1' is the id of prefill_instances[0] already",
            "decode_instances[1]: 10.0.1.2:8200 is the address of decode_instances[0] already",
        ]

    def test_the_configuration_names_the_file_and_the_place(self, tmp_path: Path) -> None:
        bad = tmp_path / "fleet.json"
        bad.write_text('{"decode_instances": [\n}')
        config = tmp_path / "config.json"
        config.write_text(json.dumps({"instance_files": [str(bad), str(tmp_path / "none.yaml")]}))
        with pytest.raises(ConfigError) as caught:
            load_config(config)
        assert caught.value.problems == [
            f"{bad}: line 2, column 1: not valid JSON: Expecting value",
            f"{tmp_path}/none.yaml: cannot be read: No such file or directory",
        ]

    def test_a_fleet_may_be_in_files_alone(self, tmp_path: Path) -> None:
        (tmp_path / "f.yaml").write_text(YAML)
        assert parse_config({"instance_files": [str(tmp_path / "f.yaml")]}).instance_files


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SETTLE_S", 0.05)
    monkeypatch.setattr(watch, "LOOK_S", 0.5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "mounted" / "fleet.json"
    found.parent.mkdir()
    found.write_text(text("d1", "d2"))
    return found


@pytest.fixture
def router(path: Path) -> PDRouter:
    return PDRouter(parse_config(configured(instance_files=[str(path)])))


@pytest_asyncio.fixture
async def files(router: PDRouter) -> AsyncIterator[Sources]:
    made = Sources(router.config, router.membership, time.monotonic)
    made.read()
    await made.follow()
    yield made
    await made.stop()


def ids(router: PDRouter) -> set[str]:
    return {endpoint.id for endpoint in router.registry} - {"p0", "d0"}


async def until_there(router: PDRouter, *names: str) -> None:
    async def there() -> bool:
        return ids(router) == set(names)

    await until(there)


def in_place(path: Path, content: str) -> None:
    path.write_text(content)


def renamed(path: Path, content: str) -> None:
    """As editors do, and everybody should."""
    new = path.with_suffix(".new")
    new.write_text(content)
    new.replace(path)


def replaced(path: Path, content: str) -> None:
    path.unlink()
    path.write_text(content)


def config_map(path: Path, content: str) -> None:
    """As Kubernetes does: the file is a link by way of a link to a directory, which is what is moved."""
    number = len(list(path.parent.iterdir()))
    directory = path.parent / f"..data_{number}"
    directory.mkdir()
    (directory / path.name).write_text(content)
    link = path.parent / "..data_tmp"
    link.symlink_to(directory.name)
    link.replace(path.parent / "..data")
    if not path.is_symlink():
        path.unlink()
        path.symlink_to(f"..data/{path.name}")


@pytest.mark.usefixtures("files")
class TestWatched:
    @pytest.mark.parametrize("write", [in_place, renamed, replaced, config_map])
    async def test_a_change_counts_however_it_is_written(
        self, router: PDRouter, path: Path, write: Callable[[Path, str], None]
    ) -> None:
        assert ids(router) == {"d1", "d2"}
        write(path, text("d1", "d2", "d3"))
        await until_there(router, "d1", "d2", "d3")
        write(path, text("d1"))
        await until_there(router, "d1")
        assert router.membership.sources("d1") == (source_of(str(path)),)

    async def test_one_that_vanishes_is_missed_and_comes_back(self, router: PDRouter, path: Path) -> None:
        os.unlink(path)

        async def missed() -> bool:
            return any("No such file" in event.text for event in router.events.after(0))

        await until(missed)
        assert ids(router) == {"d1", "d2"}
        in_place(path, text("d1"))
        await until_there(router, "d1")

    async def test_so_may_its_directory(self, router: PDRouter, path: Path) -> None:
        shutil.rmtree(path.parent)
        os.mkdir(path.parent)
        in_place(path, text("d3"))
        await until_there(router, "d3")

    async def test_a_broken_one_changes_nothing_and_is_said_once(self, router: PDRouter, path: Path) -> None:
        in_place(path, text("d3")[:-5])
        warnings = []

        async def said() -> bool:
            warnings[:] = [event.text for event in router.events.after(0) if event.kind == "discovery"]
            return bool(warnings)

        await until(said)
        first = router.membership.ages(time.monotonic())[source_of(str(path))]

        async def older() -> bool:
            return router.membership.ages(time.monotonic())[source_of(str(path))] > first + 1.0

        await until(older)
        await said()
        assert len(warnings) == 1
        assert warnings[0].startswith(f"{path}: line 1, column")
        assert ids(router) == {"d1", "d2"}
        in_place(path, text("d3"))
        await until_there(router, "d3")
        assert router.membership.ages(time.monotonic())[source_of(str(path))] < 60.0

    async def test_files_that_the_configuration_drops_and_names(
        self, router: PDRouter, path: Path, files: Sources, tmp_path: Path
    ) -> None:
        other = tmp_path / "other.yaml"
        in_place(other, YAML)
        changed = parse_config(configured(instance_files=[str(other)]))
        router.reconfigure(changed, ["instance_files"])
        await files.follow()
        await until_there(router, "p1", "d1", "d2")
        await until(lambda: list(router.membership.ages(0.0)) == [source_of(str(other))])


async def test_the_same_content_is_no_change(path: Path) -> None:
    looks: list[bool] = []
    whole = text("d1", "d2")
    async for changed in WatchedFile(str(path)).looks():
        looks.append(changed)
        if len(looks) == 3:
            break
        renamed(path, whole)
    assert looks == [True, False, False]


async def test_half_a_file_is_not_taken(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a YAML file makes sense too."""
    found = [b"before", b"before", b"half", b"more", b"whole", b"whole", b"whole"]
    monkeypatch.setattr(watch, "_digest", lambda _: found.pop(0) if len(found) > 1 else found[0])
    seen = []
    async for changed in WatchedFile(str(path)).looks():
        seen.append((changed, len(found)))
        if len(seen) == 2:
            break
    assert seen == [(True, 5), (True, 1)]


def test_a_file_that_is_broken_at_the_start(router: PDRouter, path: Path) -> None:
    in_place(path, "[]")
    files: Any = Sources(router.config, router.membership, time.monotonic)
    with pytest.raises(ConfigError, match="must be an object"):
        files.read()
