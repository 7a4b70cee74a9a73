"""What a scheduler in this process takes for cached."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vllm_pd_scheduler.request.api import CHAT, COMPLETIONS
from vllm_pd_scheduler.request.body import JsonBody
from vllm_pd_scheduler.request.json_text import finish
from vllm_pd_scheduler.request.prompt import read_prompt
from vllm_pd_scheduler.router import PDRouter


def cached_blocks(router: PDRouter, instance_id: str, body: Mapping[str, Any]) -> int:
    """Return how many leading blocks of a chat, or a completion, are taken for cached on an instance."""
    key, api = router._core.reader.hash_key, CHAT if "messages" in body else COMPLETIONS
    blocks = finish(read_prompt(JsonBody.parse(json.dumps(body).encode(), api), key)).blocks
    return router.registry.prefixes.match(blocks).get(router.registry.get(instance_id).holder, 0)
