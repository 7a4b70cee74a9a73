"""Decisions as people and programs read them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

from ..fleet.endpoint import Endpoint
from ..telemetry import Ending
from .decision import Attempt, Choice, Decision

MAX_CANDIDATES = 16
"""Candidates of a choice that are shown, the best ones."""
MAX_IDS = 32
"""Instances that are named for each reason to leave them out."""

_LARGEST = 1e300
"""What is beyond is shown as null, as infinity is."""


def explained(decision: Decision, clock_offset: float) -> dict[str, Any]:
    """Return a decision as JSON has it. ``clock_offset`` makes Unix seconds of its times."""
    arrived = datetime.fromtimestamp(decision.arrived + clock_offset, UTC)
    return {
        "number": decision.number,
        "time": arrived.isoformat(timespec="milliseconds"),
        "request_id": decision.request_id,
        "id": decision.id or None,
        "path": decision.path,
        "model": decision.model,
        "asked_model": decision.asked_model,
        "stream": decision.stream,
        "prompt_tokens": round(decision.prompt_tokens),
        "served": _served(decision),
        "not_split": decision.not_split,
        "status": decision.status,
        "reason": decision.reason,
        "continues": _continues(decision),
        "waited_s": _rounded(decision.waited),
        "encode": _encode(decision),
        "prefill": _prefill(decision),
        "decode": _decode(decision),
        "predicted_ttft_s": _rounded(decision.predicted_ttft),
        "ttft_s": _rounded(decision.ttft),
        "duration_s": _rounded(decision.duration),
        "outcome": decision.ending or ("rejected" if decision.reason is not None else None),
    }


def in_a_line(decision: Decision) -> str:
    """Return the short form, for a header: printable ASCII."""
    parts = [f"served={_served(decision)}"]
    if decision.continues_from is not None:
        parts.append(f"continues={decision.continues_from or '?'} after {decision.continues_after}")
    if decision.reason is not None:
        parts.append(f"reason={decision.reason}")
    if decision.encode_attempts:
        ids = dict.fromkeys(each.instance for each in decision.encode_attempts)
        parts.append(f"encode={'+'.join(ids)} {decision.encoded} of {decision.media}")
    attempts = decision.prefill_attempts
    if attempts:
        parts.append(_short("prefill", attempts[-1].instance, decision.prefill))
        if attempts[-1].source:
            parts.append(f"source={attempts[-1].source}")
    if decision.decode_to:
        parts.append(_short("decode", decision.decode_to[0].id, decision.decode))
    if decision.predicted_ttft is not None:
        parts.append(f"predicted_ttft={decision.predicted_ttft:.3g}")
    line = ", ".join(parts)
    return "".join(letter if " " <= letter <= "~" else "?" for letter in line)


def _served(decision: Decision) -> str | None:
    return "rejected" if decision.reason is not None else decision.served


def _continues(decision: Decision) -> dict[str, Any] | None:
    if decision.continues_from is None:
        return None
    return {"decode": decision.continues_from or None, "tokens": decision.continues_after}


def _encode(decision: Decision) -> dict[str, Any] | None:
    if not decision.encode_attempts:
        return None
    return {
        "items": decision.media,
        "encoded": decision.encoded,
        "took_s": _rounded(decision.encode_took),
        "attempts": _attempts(decision.encode_attempts),
    }


def _prefill(decision: Decision) -> dict[str, Any] | None:
    choice, attempts = decision.prefill, decision.prefill_attempts
    if choice is None and not attempts:
        return None
    last = attempts[-1] if attempts else Attempt("")
    picked = last.instance or (choice.picked.id if choice else None)
    return {
        **_choice(choice, picked, "last_resort"),
        "predicted_s": _rounded(last.predicted),
        "took_s": _rounded(last.took),
        "source": {"instance": last.source, "tokens": round(last.pulled)} if last.source else None,
        "attempts": _attempts(attempts),
    }


def _decode(decision: Decision) -> dict[str, Any] | None:
    if not decision.decode_to:
        return None
    choice, attempts, answered_by = decision.decode, list(decision.decode_attempts), decision.answered_by
    told = bool(attempts) and attempts[-1].instance == answered_by
    if answered_by is not None and (decision.ending is Ending.OK or not told):
        attempts.append(Attempt(answered_by, decision.ending))
    picked = decision.decode_to[0].id
    rule = "disaggregation" if choice else "last_resort"
    return {
        **_choice(choice, picked, rule),
        "then": [endpoint.id for endpoint in decision.decode_to[1:]],
        "attempts": _attempts(attempts),
    }


def _choice(choice: Choice | None, picked: str | None, other_rule: str) -> dict[str, Any]:
    """Return what is known of a pick; ``other_rule`` has chosen if it was not the strategy."""
    if choice is None:
        return {
            "strategy": None,
            "by": other_rule,
            "picked": picked,
            "of": 0,
            "candidates": [],
            "left_out": {},
        }
    by_strategy = choice.picked.id == picked
    return {
        "strategy": choice.strategy,
        "by": "strategy" if by_strategy else other_rule,
        "picked": picked,
        "of": choice.number,
        "candidates": list(_candidates(choice)),
        "left_out": left_out(choice),
    }


def _attempts(attempts: Iterable[Attempt]) -> list[dict[str, str | None]]:
    return [{"instance": each.instance, "outcome": each.outcome} for each in attempts]


def _candidates(choice: Choice) -> Iterator[dict[str, Any]]:
    """Yield the best candidates: the one that was taken, then the others by their scores."""
    scores, picked = _scores(choice), choice.picked
    others = [each for each in choice.offered if each is not picked and each not in choice.tried]
    others.sort(key=lambda endpoint: scores.get(endpoint, ()))
    for endpoint in [picked, *others][:MAX_CANDIDATES]:
        terms = choice.terms if endpoint is picked else {}
        made_of = {str(name): _number(value) for name, value in terms.items()}
        yield {"id": endpoint.id, "score": _score(scores.get(endpoint, ())), "terms": made_of}


def _scores(choice: Choice) -> dict[Endpoint, tuple[float, ...]]:
    if not choice.scores:
        return {}
    width = len(choice.scores) // len(choice.offered)
    parts = zip(*[iter(choice.scores)] * width, strict=True)
    return dict(zip(choice.offered, parts, strict=True))


def left_out(choice: Choice) -> dict[str, list[str]]:
    """Return who could not be chosen, by why: by what is missing in each tuple of the one before.

    A state of the instance's, ``other model``, ``tried`` (it has failed this request), ``trial`` (it was
    ejected, and another request shows whether it can serve), ``full``; ``not drawn`` is those beside a
    sample, full or not.
    """
    found: dict[str, list[str]] = {}

    def leave_out(endpoint: Endpoint, why: str) -> None:
        ids = found.setdefault(why, [])
        if len(ids) < MAX_IDS:
            ids.append(endpoint.id)

    for endpoint, state in choice.out_of_service:
        leave_out(endpoint, state)
    serving, offered, tried = set(choice.serving), set(choice.offered), set(choice.tried)
    for endpoint in choice.routable:
        if endpoint not in serving:
            leave_out(endpoint, "other model")
        elif endpoint in tried:
            leave_out(endpoint, "tried")
        elif endpoint not in offered:
            rest = "full" if choice.complete else "not drawn"
            leave_out(endpoint, "trial" if endpoint in choice.on_trial else rest)
    return found


def _short(role: str, picked: str, choice: Choice | None) -> str:
    text = f"{role}={picked}"
    if choice is None or choice.picked.id != picked:
        return text
    score = _score(_scores(choice).get(choice.picked, ()))
    if isinstance(score, list):
        text += f" score={'/'.join(map(str, score))}"
    elif score is not None:
        text += f" score={score}"
    return f"{text} of {choice.number}"


def _score(parts: tuple[float, ...]) -> float | list[float | None] | None:
    """Return a score as JSON can have it."""
    numbers = [_number(each) for each in parts]
    return numbers if len(numbers) > 1 else numbers[0] if numbers else None


def _number(value: Any) -> float | None:
    """Return a number with six digits; ``None`` if it is none, or not finite."""
    if isinstance(value, int | float) and -_LARGEST < value < _LARGEST:
        return float(f"{value:.6g}")
    return None


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
