"""The profile of a simulated engine: its sizes, its speeds and its lease."""

from dataclasses import dataclass, field, fields
from typing import Self


def _setting(default: float, help: str) -> float:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, slots=True)
class EngineProfile:
    """Sizes in tokens or blocks, times in seconds. The defaults are of the order of one mid-size GPU.

    The server has a command line option for each field: ``--prefill-rate`` for ``prefill_rate``.
    """

    block_size: int = field(default=16, metadata={"help": "tokens a KV block holds"})
    num_blocks: int = field(default=8192, metadata={"help": "KV blocks of the engine"})
    prefix_caching: bool = field(default=True, metadata={"help": "keep the KV of prompts for later ones"})
    max_num_seqs: int = field(default=256, metadata={"help": "requests that run at the same time"})
    max_num_batched_tokens: int = field(default=8192, metadata={"help": "token budget of one step"})
    step_overhead: float = _setting(0.001, "seconds that every step costs")
    prefill_rate: float = _setting(20_000.0, "prompt tokens a second")
    prefill_per_kv_token: float = _setting(
        0.0, "seconds more for each prompt token and each token before it that it attends to"
    )
    prefill_min: float = _setting(0.0, "seconds that reading prompt tokens costs at least, however few")
    decode_base: float = _setting(0.008, "seconds a step costs when it decodes at all")
    decode_per_seq: float = _setting(0.000_05, "seconds more for each decoding request")
    decode_per_kv_token: float = _setting(1e-8, "seconds more for each token of KV read while decoding")
    kv_bytes_per_token: int = field(default=131_072, metadata={"help": "bytes of KV cache of one token"})
    transfer_bandwidth: float = _setting(10e9, "bytes a second of a KV transfer")
    transfer_latency: float = _setting(0.002, "seconds that every KV transfer costs")
    lease: float = _setting(30.0, "seconds that handed-off blocks stay pinned")

    def __post_init__(self) -> None:
        """Raise ValueError for a size or rate that is not positive, or a time below zero."""
        for name in ("block_size", "num_blocks", "max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("prefill_rate", "transfer_bandwidth"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for item in fields(self):
            if getattr(self, item.name) < 0:
                raise ValueError(f"{item.name} must not be negative, got {getattr(self, item.name)}")

    @classmethod
    def instant(cls) -> Self:
        """Return the profile of an engine whose steps and transfers take no time."""
        return cls(
            step_overhead=0.0,
            prefill_rate=1e12,
            decode_base=0.0,
            decode_per_seq=0.0,
            decode_per_kv_token=0.0,
            transfer_bandwidth=1e18,
            transfer_latency=0.0,
        )

    @property
    def capacity(self) -> int:
        """Tokens that the KV cache holds."""
        return self.block_size * self.num_blocks

    def blocks_for(self, tokens: int) -> int:
        """Return how many blocks hold so many tokens."""
        return -(-tokens // self.block_size)

    def step_time(self, prefill_tokens: int, decoding: int, kv_tokens: int, attended: float = 0.0) -> float:
        """Return the seconds of a step.

        It computes ``prefill_tokens`` of prompts and decodes one token of ``decoding`` requests whose
        contexts have ``kv_tokens`` together. ``attended`` is the number of pairs of tokens that attention
        compares: the sum, over the chunks of prompts, of tokens * (context before them + tokens / 2).
        """
        duration = self.step_overhead
        if prefill_tokens:
            compute = prefill_tokens / self.prefill_rate + attended * self.prefill_per_kv_token
            duration += max(self.prefill_min, compute)
        if decoding:
            duration += (
                self.decode_base + decoding * self.decode_per_seq + kv_tokens * self.decode_per_kv_token
            )
        return duration

    def transfer_time(self, tokens: int) -> float:
        """Return the seconds of a transfer of the KV cache of so many tokens."""
        return self.transfer_latency + tokens * self.kv_bytes_per_token / self.transfer_bandwidth

    def arguments(self) -> list[str]:
        """Return the server's command line options for this profile."""
        return [_option(item.name.replace("_", "-"), getattr(self, item.name)) for item in fields(self)]


def _option(name: str, value: float | bool) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name}={value}"
