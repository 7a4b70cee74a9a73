"""Tables, JSON, the progress bar, the figure."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from vllm_pd_scheduler.replay import plot as plotting
from vllm_pd_scheduler.replay.job import Job, Outcome
from vllm_pd_scheduler.replay.report import as_json, progress_bars, show

Outcomes = Callable[..., Sequence[Outcome]]
Make = Callable[[bool], Job]


def shown(outcomes: Sequence[Outcome], job: Job, width: int = 140) -> str:
    console = Console(file=io.StringIO(), width=width)
    show(outcomes, job.conditions, console)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def rows(text: str, label: str) -> list[list[str]]:
    return [line.split()[1:] for line in text.splitlines() if line.split()[:1] == [label]]


class TestTable:
    def test_the_best_is_marked(self, outcomes: Outcomes, job: Make) -> None:
        text = shown(outcomes("slow", "fast"), job(False))
        assert "trace.jsonl: 11 requests at 1 times their rate (1.1 a second), 3 prefill and 2" in text
        ttft, tpot, fleet = rows(text, "fast")
        assert ttft == ["100.00*", "1.100*", "1.100*", "1.100*", "1.100*"]
        assert tpot == ["20.00"] * 4  # all the same: none is the best
        assert fleet[-4:] == ["25.0", "0*", "11.1*", "0.0"]
        ttft, tpot, fleet = rows(text, "slow")
        assert ttft == ["81.82", "2.200", "2.200", "2.200", "2.200"]
        assert fleet[-3] == "2"
        assert "slow: rejected: queue_full 2" in text

    def test_one_strategy_is_not_the_best_of_one(self, outcomes: Outcomes, job: Make) -> None:
        assert "*" not in shown(outcomes("slow"), job(False))

    def test_rates_that_were_found_or_not(self, outcomes: Outcomes, job: Make) -> None:
        text = shown(outcomes("fast", "slow", "instant", search=True), job(True))
        assert float(rows(text, "fast")[0][-1]) == pytest.approx(5 / 1.1, rel=0.02)
        assert rows(text, "slow")[0][-1] == "-"
        assert "slow: no rate has 95% of the requests within the limits, not even 0.000977 with 81.8%" in text
        assert rows(text, "instant")[0][-1] == "1024.000*"
        assert "instant: 100.0% are within the limits even at 1024, the highest rate tried" in text

    def test_eighty_columns_are_enough(self, outcomes: Outcomes, job: Make) -> None:
        text = shown(outcomes("slow+late_binding", "fast", search=True), job(True), width=80)
        assert max(map(len, text.splitlines())) <= 80
        assert "…" not in text
        assert "slow+late" in text


def test_json_has_the_documented_fields(outcomes: Outcomes, job: Make) -> None:
    found = json.loads(json.dumps(as_json(outcomes("slow", "fast", search=True), job(True).conditions)))
    assert list(found) == ["schema", "versions", "trace", "fleet", "rate", "slo", "strategies"]
    assert found["schema"] == 1
    assert found["trace"] == {"name": "trace.jsonl", "requests": 11, "seconds": 10.0}
    shape = {"prefill": 3, "decode": 2, "setup": "llama-3.3-70b-4xh100", "seed": 7}
    assert found["fleet"] == {
        **shape,
        "realistic": False,
        "leaves": 1,
        "oversubscription": 4.0,
        "foreign": 0.0,
    }
    assert (found["rate"], found["slo"]) == (1.0, {"ttft": 5.0, "tpot": 0.05, "target": 0.95})
    slow, fast = found["strategies"]
    document = (Path(__file__).parents[2] / "docs" / "replay.md").read_text(encoding="utf-8")
    for name in [*slow, *found, *slow["find_rate"]]:
        assert f"`{name}`" in document, f"{name} is not in docs/replay.md"
    assert slow["rejected"] == {"queue_full": 2}
    assert (slow["find_rate"]["rate"], slow["find_rate"]["open_ended"]) == (None, False)
    assert set(fast["ttft"]) == {"mean", "p50", "p90", "p99"}
    assert fast["find_rate"]["tried"][0] == {"rate": 1.0, "attainment": 1.0}


class TestProgress:
    def test_a_bar_a_strategy_on_a_terminal(self) -> None:
        console = Console(file=io.StringIO(), force_terminal=True, width=100)
        with progress_bars(["fast", "slow[x]"], 11, console) as progress:
            progress(1, 0.25, 7)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert "slow[x] x0.25" in text
        assert "7/11" in text

    def test_nothing_elsewhere(self) -> None:
        console = Console(file=io.StringIO())
        with progress_bars(["fast"], 11, console) as progress:
            progress(0, 1.0, 11)
        assert not console.file.getvalue().strip()  # type: ignore[attr-defined]


class TestPlot:
    @pytest.mark.parametrize("suffix", plotting.SUFFIXES)
    def test_it_is_drawn(self, outcomes: Outcomes, job: Make, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"figure{suffix}"
        plotting.plot(outcomes("slow", "fast", "instant"), job(False).conditions, path)
        assert path.read_bytes()[:4] in (b"\x89PNG", b"<?xm", b"%PDF")

    def test_a_name_is_no_formula(self, outcomes: Outcomes, job: Make, tmp_path: Path) -> None:
        """Matplotlib reads text between dollar signs as mathematics."""
        path = tmp_path / "figure.svg"
        plotting.plot(outcomes("slow+a=$\\x$", "fast"), job(False).conditions, path)
        assert path.stat().st_size > 1000

    def test_long_lines_are_thinned_to_their_means(self) -> None:
        times, sizes = plotting._thinned([(float(at), at % 2) for at in range(1200)])
        assert times == [float(at) for at in range(0, 1200, 4)]
        assert set(sizes) == {0.5}
        assert plotting._thinned([]) == ([], [])
