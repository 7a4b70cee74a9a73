"""The benchmarks do not run with the tests: what they import must be there all the same."""

import importlib
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[2] / "benchmarks").glob("test_*.py"))


@pytest.mark.parametrize("name", [*(file.stem for file in FILES), "kubernetes"])
def test_each_can_be_imported(name: str) -> None:
    assert importlib.import_module(f"benchmarks.{name}")


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("choices", "--loads=chat,tea", "'tea' is none of mooncake, agents, chat, code, batch"),
        ("choices", "--models=gpt", "'gpt' is none of llama, deepseek"),
        ("choices", "--fleets=0", "'0': write whole numbers from 1 on"),
        ("choices", "--strategies=fastest", "unknown strategy 'fastest'"),
        ("choices", "--mooncake=nowhere.jsonl", "there is no file nowhere.jsonl"),
        ("replicas", "--others=x", "'x': write whole numbers from 0 on"),
    ],
)
def test_what_an_option_cannot_be_is_said(
    name: str, option: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [name, option])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{name}").main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
