"""The LoRA adapters of a simulated instance: which there are, and which have requests."""

from dataclasses import dataclass, field

from .engine import EngineRequest
from .protocol import ApiError


@dataclass(slots=True)
class Adapters:
    """Adapters by name, each with its path; ``enabled`` is ``--enable-lora``, ``slots`` ``--max-loras``.

    To load one takes no time, and all slots are free for all: only what vLLM tells of them is simulated.
    """

    enabled: bool
    slots: int
    paths: dict[str, str]
    _requests: dict[str, list[EngineRequest]] = field(default_factory=dict)

    def served(self, model: str | None, base: str) -> str:
        """Return the model that serves a request, which may be an adapter; raise ApiError for another one."""
        if not model or model == base:
            return base
        if model not in self.paths:
            raise ApiError(404, f"The model `{model}` does not exist.", "NotFoundError", "model")
        return model

    def load(self, name: str | None, path: str | None, in_place: bool) -> str:
        """Load an adapter and return what vLLM says of that; raise ApiError as vLLM refuses it."""
        if not name or not path:
            raise ApiError(400, "Both 'lora_name' and 'lora_path' must be provided.", "InvalidUserInput")
        if name in self.paths and not in_place:
            message = (
                f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in "
                "place, set 'load_inplace' to True."
            )
            raise ApiError(400, message, "InvalidUserInput")
        self.paths[name] = path
        return f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, name: str | None) -> str:
        """Unload an adapter and return what vLLM says of that; raise ApiError as vLLM refuses it."""
        if not name:
            raise ApiError(
                400, "'lora_name' needs to be provided to unload a LoRA adapter.", "InvalidUserInput"
            )
        if name not in self.paths:
            raise ApiError(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
        del self.paths[name]
        return f"Success: LoRA adapter '{name}' removed successfully."

    def begin(self, model: str, requests: list[EngineRequest]) -> None:
        """Count requests of a model, if that is an adapter."""
        if model in self.paths:
            self._requests.setdefault(model, []).extend(requests)

    def end(self, model: str, requests: list[EngineRequest]) -> None:
        """Count them no more."""
        left = [each for each in self._requests.pop(model, []) if each not in requests]
        if left:
            self._requests[model] = left

    def running(self) -> list[str]:
        """Return the adapters of requests that run."""
        return [name for name, each in self._requests.items() if any(r.started is not None for r in each)]

    def waiting(self) -> list[str]:
        """Return the adapters of requests that wait."""
        return [name for name, each in self._requests.items() if any(r.started is None for r in each)]
