"""What a scheduler in this process takes for cached."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vllm_pd_scheduler.request.api import CHAT
from vllm_pd_scheduler.request.body import JsonBody
from vllm_pd_scheduler.request.json_text import finish
from vllm_pd_scheduler.request.prompt import read_prompt
from vllm_pd_scheduler.router import PDRouter


def cached_blocks(router: PDRouter, instance_id: str, chat: Mapping[str, Any]) -> int:
    """Return how many leading blocks of a chat are taken for cached on an instance."""
    key = router._core.reader.hash_key
    blocks = finish(read_prompt(JsonBody.parse(json.dumps(chat).encode(), CHAT), key)).blocks
    return router.registry.prefixes.match(blocks).get(router.registry.get(instance_id).holder, 0)
