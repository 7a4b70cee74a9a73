"""The connectors of a fleet: which of them each instance speaks."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Iterable
from typing import Protocol

from ..models import ConnectorChoice, InstanceRole, PDInstance
from ..request.body import JsonBody
from .attempt import Attempt
from .base import Connector, Legs, Peer, Settings
from .fence import ConnectorFence, connector_failures
from .names import make_connector, settings_of
from .spoken import Spoken


class Reached(Protocol):
    """An instance, or a rank of it, and where it is reached: an endpoint of the fleet."""

    @property
    def instance(self) -> PDInstance:
        """As it is configured."""
        ...

    @property
    def host(self) -> str:
        """IP address, or its name as long as that has none."""
        ...

    @property
    def rank(self) -> int | None:
        """Of its engines the one that was chosen; ``None`` if it has one."""
        ...

    @property
    def spoken(self) -> Spoken:
        """Which protocol its last hand-off had."""
        ...


class Connectors:
    """Finds the connector of an instance: its own, or that of the fleet, as ``of_the_fleet`` tells.

    ``given`` is used for all instances, whatever they say: a script's own.
    """

    def __init__(self, of_the_fleet: Callable[[], ConnectorChoice], given: Connector | None = None) -> None:
        self.failures = connector_failures()
        """By a connector's class and the call."""
        self._of_the_fleet = of_the_fleet
        self._given = None if given is None else ConnectorFence(given, self.failures)
        self._given_settings = None if given is None else given.settings_type()
        self._fences: dict[str, ConnectorFence] = {}
        self._known: dict[ConnectorChoice | None, tuple[ConnectorFence, Settings]] = {}
        """Of instances that name a connector, or none, as the fleet's is now."""
        self._run = secrets.token_hex(8)
        self._numbers = itertools.count()
        self._of_prefill: tuple[ConnectorFence, ...] = (self.of(None),)
        self.some_need_prefill = self.of(None).needs_prefill
        """Whether some D serve nothing but what a P prefills."""
        self.some_can_pull = self.of(None).can_pull
        """Whether there may be P that can pull what others have cached."""

    def prepare(self, instances: Iterable[PDInstance]) -> None:
        """Make what instances that are about to come need, and what the fleet does.

        Raise :exc:`.names.UnknownConnector` if that cannot be: nothing has changed then, and nothing raises
        that once they are there.
        """
        if self._given is None:
            own = {each.connector for each in instances if each.role is not InstanceRole.ENCODE}
            for choice in own:
                self._fence(choice or self._of_the_fleet())
            self._fence(self._of_the_fleet())

    def used_by(self, prefill: Iterable[PDInstance], decode: Iterable[PDInstance] = ()) -> None:
        """Take which P and D there are: only the connectors of P are asked whether a request can be split."""
        self._known.clear()
        if self._given is None:
            of_prefill, of_decode = self._choices(prefill), self._choices(decode)
            self._of_prefill = tuple({self._fence(choice): None for choice in of_prefill})
            self.some_need_prefill = any(self._fence(choice).needs_prefill for choice in of_decode)
            self.some_can_pull = any(fence.can_pull for fence in self._of_prefill)

    def _choices(self, instances: Iterable[PDInstance]) -> set[ConnectorChoice]:
        own = {each.connector for each in instances}
        return {choice or self._of_the_fleet() for choice in own}

    def of(self, instance: PDInstance | None) -> ConnectorFence:
        """Return an instance's connector, or that of the fleet."""
        return self._with_settings(None if instance is None else instance.connector)[0]

    def _with_settings(self, own: ConnectorChoice | None) -> tuple[ConnectorFence, Settings]:
        """Return the connector of instances that name their ``own``, or none, and its settings."""
        found = self._known.get(own)
        if found is None:
            choice = own or self._of_the_fleet()
            fence = self._fence(choice) if self._given is None else self._given
            settings = settings_of(choice) if self._given_settings is None else self._given_settings
            found = self._known[own] = fence, settings
        return found

    def _fence(self, choice: ConnectorChoice) -> ConnectorFence:
        fence = self._fences.get(choice.name)
        if fence is None:
            made = make_connector(choice.name)
            fence = self._fences[choice.name] = ConnectorFence(made, self.failures)
        return fence

    def can_split(self, body: JsonBody) -> bool:
        """Whether a request can be split whoever gets it."""
        return all(fence.can_split(body) for fence in self._of_prefill)

    def can_pull(self, instance: PDInstance) -> bool:
        """Whether an instance can pull what others of its kind have cached, and they from it."""
        return self.of(instance).can_pull

    def attempt(self, prefill: Reached, *, token_ids: bool = False) -> Attempt:
        """Return a new attempt to split a request, with the P that was chosen.

        ``token_ids`` says whether D is to get those of the prompt, if it takes them.
        """
        instance, spoken = prefill.instance, prefill.spoken
        fence, settings = self._with_settings(instance.connector)
        takes = spoken.takes_token_ids
        peer = _peer(prefill, settings, spoken.protocol, takes)
        number = f"{self._run}-{next(self._numbers)}"
        return Attempt(fence, Legs(number, peer, token_ids=token_ids and takes))

    def peer(self, at: Reached) -> Peer:
        """Return an instance, or a rank of it, as its connector sees it."""
        return _peer(at, self._with_settings(at.instance.connector)[1])


def _peer(at: Reached, settings: Settings, speaks: str = "", takes_token_ids: bool = False) -> Peer:
    instance = at.instance
    where = instance.instance_id, at.host, instance.port
    return Peer(*where, settings, speaks, takes_token_ids, at.rank, instance.data_parallel_size)
