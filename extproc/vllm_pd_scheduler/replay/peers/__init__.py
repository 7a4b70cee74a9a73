"""Policies of other routers, written from their documentation, to compare with in a replay.

Each file names what it was written from. What they have in common favours them: without ``--realistic`` they
use our prefix index, which knows the real size of each KV cache; what they count as in flight ends with P's
answer, though some of them learn of that later.
"""

from ...strategies import Strategy
from .aibrix import Aibrix
from .base import Peer, Site
from .conversation import Conversation
from .dynamo import Dynamo, DynamoConditional, DynamoLmetric
from .llm_d import LlmD, LlmDWeighted
from .plain import CacheAware, ConsistentHash, Random
from .ppd import Ppd
from .vllm_router import KvAware

PEERS: dict[str, type[Strategy]] = {
    "random": Random,
    "cache_aware": CacheAware,
    "consistent_hash": ConsistentHash,
    "llm_d": LlmD,
    "llm_d_weighted": LlmDWeighted,
    "dynamo": Dynamo,
    "dynamo_lmetric": DynamoLmetric,
    "dynamo_conditional": DynamoConditional,
    "kv_aware": KvAware,
    "aibrix": Aibrix,
    "conversation": Conversation,
    "ppd": Ppd,
}

__all__ = ["PEERS", "Peer", "Site"]
