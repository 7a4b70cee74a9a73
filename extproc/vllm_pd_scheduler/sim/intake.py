"""Takes a request in at an engine: its jobs, or why they cannot be run."""

import uuid
from typing import Any

from .answers import Shape
from .engine import EngineRequest, HandOff
from .faults import Entry
from .handoff import FatalHandOff
from .job import Job
from .options import WITHOUT_PARAMS, Options
from .protocol import AnyBody, ApiError, Length, TooLong, choose_length
from .text import Answer, Prompt
from .worker import Worker

MAX_N = 16_384
"""Largest ``n``: vLLM's default ``VLLM_MAX_N_SEQUENCES``."""


class Intake:
    """One request at one worker; raise ApiError if it wants no possible number of choices."""

    def __init__(self, body: AnyBody, shape: Shape, entry: Entry, worker: Worker, options: Options) -> None:
        if body.n is not None and not 1 <= body.n <= MAX_N:
            raise ApiError(400, f"n must be 1 to {MAX_N}, got {body.n}.", "BadRequestError", "n")
        self._body = body
        self._shape = shape
        self._entry = entry
        self._worker = worker
        self._options = options
        takes = options.kv_connector not in WITHOUT_PARAMS
        self._params = worker.connector.params(body) if takes else {}
        self._hand_off = _kind_of(self._params, worker)

    def jobs(self) -> list[Job]:
        """Return the jobs of the request, one for each choice; raise ApiError if it cannot be run."""
        body = self._body
        choices = (
            (prompt, number) for prompt in body.prompts(self._shape.model) for number in range(body.n or 1)
        )
        try:
            jobs = [self._job(index, *choice) for index, choice in enumerate(choices)]
        except TooLong:
            # As in vLLM, a request that is rejected releases the sender's blocks.
            if self._hand_off is HandOff.RECEIVE:
                _release_hand_off(self._params, self._entry, self._worker)
            raise
        if self._hand_off is not HandOff.NONE:
            self._entry.hand_off = self._hand_off.value
        if self._hand_off is HandOff.RECEIVE:
            _attach_hand_off(jobs, self._entry, self._worker)
        return jobs

    def _job(self, index: int, prompt: Prompt, number: int) -> Job:
        worker, answer = self._worker, Answer(prompt, number)
        connector, profile = worker.connector, worker.engine.profile
        params = connector.nth(self._params, index)
        length = self._length(prompt, answer)
        # A name of its own, even if a client sends the same X-Request-Id twice.
        name = f"{self._shape.answer_id}-{index}-{uuid.uuid4().hex[:8]}"
        if self._hand_off is HandOff.SEND:
            name = connector.request_id(params) or name
        pushes = self._hand_off is HandOff.SEND and not connector.lends
        salt = self._body.cache_salt or ""
        hashes = prompt.block_hashes(profile.block_size, salt) if profile.prefix_caching else ()
        kept = HandOff.NONE if pushes else self._hand_off
        if worker.publisher is not None:
            worker.publisher.knows(prompt, hashes)
        request = EngineRequest(name, prompt.tokens, length.tokens, kept, hashes)
        return Job(request, prompt, index, length.finish_reason, answer, params=params, pushes=pushes)

    def _length(self, prompt: Prompt, answer: Answer) -> Length:
        """Return how long an answer is; one that stops is not handed over by each connector."""
        natural = 1 if self._worker.fault.eos else answer.natural_length
        length = choose_length(self._body, prompt, natural, self._options.max_model_len)
        if self._hand_off is HandOff.SEND:
            connector = self._worker.connector
            if connector.answers_when_fetched:
                return Length(1, "length")
            if length.finish_reason == "stop" and not connector.sends_stopped:
                self._hand_off = HandOff.NONE
        return length


def _kind_of(params: dict[str, Any], worker: Worker) -> HandOff:
    try:
        return worker.connector.kind(params)
    except FatalHandOff as error:
        worker.die(str(error))
        return HandOff.NONE


def _attach_hand_off(jobs: list[Job], entry: Entry, worker: Worker) -> None:
    for job in jobs:
        params = job.params
        try:
            blocks = worker.engine.profile.blocks_for(job.prompt.tokens)
            connector = worker.connector
            job.offer = connector.named(
                connector.read(params, blocks), job.request.request_id, job.prompt.digest
            )
        except FatalHandOff as error:
            worker.die(str(error))
        cached = params.get("remote_prefill_cached_tokens")
        job.remote_cached = cached if type(cached) is int else None
        job.on_hand_off = entry.outcomes.append


def _release_hand_off(params: dict[str, Any], entry: Entry, worker: Worker) -> None:
    if worker.connector.pushes:  # a request that is rejected tells the sender nothing
        return
    try:
        offer = worker.connector.read(params, blocks_needed=0)
    except FatalHandOff:
        return
    if offer:
        entry.outcomes.append("released")
        worker.release(offer)
