"""Which containers are instances, of what an engine has listed and of what has happened since."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from ...config import InstanceConfig, SchedulerConfig, describe_error
from ...config.fleet_instance import rank_count
from ...config.sources import DockerSource
from ...models import InstanceRole, PDInstance
from .containers import Change, Container, OddContainer, Reach, read_labels


class View:
    """The containers of an engine."""

    def __init__(self, source: DockerSource, config: SchedulerConfig) -> None:
        self._source = source
        self._config = config
        self._stopping: set[str] = set()
        self.listed: Sequence[Any] | None = None
        """What the engine has listed last; ``None``: nothing yet."""

    def note(self, change: Change) -> bool:
        """Note what has happened; return whether a container is about to stop, and gets nothing new."""
        if change.ends:
            self._stopping.discard(change.container)
        elif change.stops:
            self._stopping.add(change.container)
        return change.stops

    def instances(self, host: str) -> tuple[list[PDInstance], list[str]] | None:
        """Return the instances, and a line for each container that is none; ``host`` is the engine's address.

        That is not known, ``None``, as long as nothing was listed.

        Raise :exc:`ValueError` if the source's own settings cannot be used, so that none can be made.
        """
        if self.listed is None:
            return None
        entries: list[tuple[InstanceRole, InstanceConfig]] = []
        left_out: list[str] = []
        for each in self.listed:
            name = "a container"
            try:
                container = Container.read(each)
                name = f"container {container.name}"
                if container.id not in self._stopping:
                    entries.append(self._entry(container, host))
            except ValidationError as error:
                why = "; ".join(map(describe_error, error.errors(include_url=False)))
                left_out.append(f"{name} is left out: {why}")
            except OddContainer as error:
                left_out.append(f"{name} is left out: {error}")
        return [self._config.instance(role, entry) for role, entry in entries], left_out

    def _entry(self, container: Container, host: str) -> tuple[InstanceRole, InstanceConfig]:
        source = self._source
        labels = read_labels(container, Reach(source.network, source.published, source.address or host))
        entry = InstanceConfig(
            id=container.name if source.name is None else f"{source.name}.{container.name}",
            host=labels.host,
            port=labels.port,
            api_key=source.api_key,
            server_name=source.server_name,
            models=labels.models,
            revision=labels.revision,
            data_parallel_size=labels.data_parallel_size,
        )
        try:
            rank_count(entry, self._config.connector, self._config.prefill_leg)
        except ValueError as error:
            raise OddContainer(str(error)) from None
        return labels.role, entry
