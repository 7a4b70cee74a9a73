"""A strategy of your own: send the requests of each model to one instance, as long as that one serves.

Instances that serve several models (LoRA adapters, say) answer faster when a model's requests come to the
instance that has it loaded. Put this file where Python finds it (``PYTHONPATH``, or a package of yours)
and name it in the configuration::

    "strategy": "sticky_model:StickyModel"

or give it a name by an entry point in your package's ``pyproject.toml``::

    [project.entry-points."vllm_pd_scheduler.strategies"]
    sticky_model = "sticky_model:StickyModel"

and write ``"strategy": "sticky_model"``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.request.context import RequestContext
from vllm_pd_scheduler.strategies import Strategy


class StickyModel(Strategy):
    """The instance that a hash of the model's name chooses; after it, those with the fewest requests.

    Of the hashes of each (model, instance) the greatest wins, so that when an instance comes or goes only
    the models that it wins or had move (rendezvous hashing). Nothing here looks at load: a model that most
    requests ask for needs more than one instance, and another strategy.
    """

    _home: Endpoint | None = None

    def rank(self, endpoints: Sequence[Endpoint], request: RequestContext, count: int) -> list[Endpoint]:
        """Find the model's home among those that can serve now, then rank by score."""
        self._home = max(endpoints, key=lambda endpoint: _affinity(request.model, endpoint))
        return super().rank(endpoints, request, count)

    def score(self, endpoint: Endpoint, request: RequestContext) -> tuple[bool, float]:
        """Home first (``False`` is less than ``True``), then fewest requests."""
        return endpoint is not self._home, endpoint.requests


def _affinity(model: str | None, endpoint: Endpoint) -> bytes:
    # Python's own hash() differs from process to process: two schedulers would choose two homes.
    return hashlib.blake2b(f"{model}\n{endpoint.id}".encode(), digest_size=8).digest()
