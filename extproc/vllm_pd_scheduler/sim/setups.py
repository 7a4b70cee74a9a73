"""Engine profiles of real set-ups (a model on some GPUs), computed from published figures.

A step is bound by arithmetic while it reads prompts and by memory while it decodes (the roofline model). No
software reaches the figures of the data sheets; ``MFU`` and ``BANDWIDTH_SHARE`` say which part it reaches,
from measurements that others have published. Tests compare the results with these:

- vLLM 0.23, Llama 3.1 8B in BF16 on an A100 40 GB decodes 75 tokens/s at batch 1, 77 % of what its memory
  allows: https://johnmusgrave.com/p/vllm-throughput-latency-sweep-on
- NVIDIA NIM 1.8, Llama 3.3 70B in FP8 on two H100: prompts of 5,000 tokens take 407 ms to the first token,
  then 18.6 ms a token: https://docs.nvidia.com/nim/benchmarking/llm/1.0.0/performance
"""

from dataclasses import dataclass
from functools import partial

from .profile import EngineProfile

GIB = 2**30
BF16, FP8 = 2, 1

MFU = {BF16: 0.50, FP8: 0.45}
"""Share of the peak arithmetic that prefill reaches (model FLOPs utilization), by bytes per weight.

FP8: NIM's 407 ms above are 46 %. BF16 is further from being bound by memory. For training, which has the same
matrix products, up to 60 % was published (https://github.com/Dao-AILab/flash-attention); 50 % is assumed
here.
"""

BANDWIDTH_SHARE = 0.85
"""Share of the peak memory bandwidth that reading weights and KV cache reaches.

Chosen so that, together with ``STEP_OVERHEAD``, it gives the 77 % measured above.
"""

STEP_OVERHEAD = 0.001
"""Seconds of a step besides the model: scheduling, sampling, launching kernels. Assumed."""

ALL_REDUCE = 10e-6
"""Seconds of one small all-reduce over NVLink. Assumed: a few times the latency of a link, about 2 µs."""

ACTIVATIONS = 2 * GIB
"""Bytes of each GPU's memory for activations and CUDA graphs. Assumed."""

MEMORY_SHARE = 0.9
"""Share of a GPU's memory that vLLM uses: its default ``gpu_memory_utilization`` before it became 0.92."""

NETWORK = 0.8 * 50e9
"""Bytes a second between two nodes: one 400 Gb/s InfiniBand port, of which RDMA reaches 80 % (assumed)."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, and vLLM's default limits for servers on it (``EngineArgs``, version 0.32)."""

    memory: int
    """Bytes, as CUDA reports them."""
    bandwidth: float
    """Peak bytes a second from its memory."""
    flops: dict[int, float]
    """Peak dense tensor operations a second, by bytes per weight."""
    max_num_batched_tokens: int
    max_num_seqs: int


@dataclass(frozen=True, slots=True)
class Model:
    """What a transformer must read and compute."""

    parameters: float
    active: float
    """Parameters that are used for one token: all of them in a dense model."""
    layers: int
    attention: int
    """Operations of attention for a pair of tokens in a layer: 2 for each dimension of score and sum."""
    kv_bytes_per_token: int
    """Bytes of KV cache of a token over all layers, in 16 bit."""
    mfu: float | None = None
    """Replaces the value of ``MFU``."""

    @classmethod
    def dense(cls, parameters: float, *, layers: int, hidden: int, kv_heads: int, head_dim: int) -> "Model":
        """Return a dense model with grouped-query attention: a key and a value for each layer and KV head.

        ``hidden`` is the number of heads times ``head_dim``.
        """
        return cls(parameters, parameters, layers, 4 * hidden, 2 * layers * kv_heads * head_dim * BF16)


# NVIDIA's data sheets "H100 Tensor Core GPU" (SXM; its figures with sparsity, halved) and "A100 80GB" (SXM).
H100 = Gpu(int(79.1 * GIB), 3.35e12, {BF16: 989e12, FP8: 1979e12}, 8192, 1024)
A100 = Gpu(int(79.1 * GIB), 2.039e12, {BF16: 312e12}, 2048, 256)
# "H200 Tensor Core GPU" (SXM): the arithmetic of an H100 and more memory.
H200 = Gpu(int(139.8 * GIB), 4.8e12, H100.flops, 8192, 1024)

# config.json and model cards on Hugging Face: meta-llama/Llama-3.1-8B-Instruct,
# meta-llama/Llama-3.3-70B-Instruct, Qwen/Qwen2.5-32B-Instruct.
LLAMA_8B = Model.dense(8.03e9, layers=32, hidden=4096, kv_heads=8, head_dim=128)
LLAMA_70B = Model.dense(70.6e9, layers=80, hidden=8192, kv_heads=8, head_dim=128)
QWEN_32B = Model.dense(32.8e9, layers=64, hidden=5120, kv_heads=8, head_dim=128)
# deepseek-ai/DeepSeek-V3: mixture of experts, and latent attention: 128 heads of 192 dimensions for the score
# and 128 for the sum, of which a latent of 512 + 64 is kept per layer. Expert parallelism costs arithmetic:
# LMSYS measured 52,300 prompt tokens/s for each node of 8 H100, 24 % of the peak (prompts of 2,000 tokens,
# https://lmsys.org/blog/2025-05-05-large-scale-ep/).
DEEPSEEK_V3 = Model(
    671e9, 37e9, layers=61, attention=2 * 128 * (192 + 128), kv_bytes_per_token=61 * 576 * BF16, mfu=0.245
)


def profile(
    model: Model,
    gpu: Gpu,
    tensor_parallel: int = 1,
    *,
    weight_bytes: int = BF16,
    block_size: int = 16,
    network: float = NETWORK,
) -> EngineProfile:
    """Return the profile of a model on ``tensor_parallel`` GPUs of one node; ``network`` in bytes a second.

    Raise ValueError if the GPU cannot compute with weights of this format, or if they leave no room for KV.

    - Prefill costs 2 operations for each active parameter and token, and attention's for each layer and pair
      of tokens.
    - A decode step reads all weights once (of a mixture of experts, a batch of some size needs nearly all)
      and each request's KV cache. The arithmetic of its requests is added, though some of it may overlap.
    """
    if weight_bytes not in gpu.flops:
        raise ValueError(f"the GPU has no arithmetic for weights of {weight_bytes} byte")
    weights = model.parameters * weight_bytes
    usable = tensor_parallel * (MEMORY_SHARE * gpu.memory - ACTIVATIONS) - weights
    blocks = int(usable / (model.kv_bytes_per_token * block_size))
    if blocks < 1:
        raise ValueError(f"{tensor_parallel} GPUs have no room for {weights / GIB:.0f} GiB of weights and KV")
    flops = (model.mfu or MFU[weight_bytes]) * gpu.flops[weight_bytes] * tensor_parallel
    # Attention is computed in 16 bit, whatever the format of the weights.
    attention_flops = (model.mfu or MFU[BF16]) * gpu.flops[BF16] * tensor_parallel
    bandwidth = BANDWIDTH_SHARE * gpu.bandwidth * tensor_parallel
    all_reduces = 2 * model.layers * ALL_REDUCE if tensor_parallel > 1 else 0.0
    read_weights = weights / bandwidth + all_reduces
    return EngineProfile(
        block_size=block_size,
        num_blocks=blocks,
        max_num_seqs=gpu.max_num_seqs,
        max_num_batched_tokens=gpu.max_num_batched_tokens,
        step_overhead=STEP_OVERHEAD,
        prefill_rate=flops / (2 * model.active),
        prefill_per_kv_token=model.layers * model.attention / attention_flops,
        prefill_min=read_weights,
        decode_base=read_weights,
        decode_per_seq=2 * model.active / flops,
        decode_per_kv_token=model.kv_bytes_per_token / bandwidth,
        kv_bytes_per_token=model.kv_bytes_per_token,
        transfer_bandwidth=network,
    )


_SETUPS = {
    "llama-3.1-8b-a100": partial(profile, LLAMA_8B, A100),
    "llama-3.1-8b-h100": partial(profile, LLAMA_8B, H100),
    "llama-3.3-70b-4xh100": partial(profile, LLAMA_70B, H100, 4),
    "llama-3.3-70b-fp8-2xh100": partial(profile, LLAMA_70B, H100, 2, weight_bytes=FP8),
    "qwen2.5-32b-2xh100": partial(profile, QWEN_32B, H100, 2),
    "deepseek-v3-fp8-8xh200": partial(profile, DEEPSEEK_V3, H200, 8, weight_bytes=FP8),
}
NAMES = tuple(_SETUPS)
"""Names of the set-ups: model, weights' format if it is not BF16, number and kind of GPUs."""


def setup(name: str, block_size: int = 16) -> EngineProfile:
    """Return the profile of a named set-up; raise ValueError, which lists the names, for any other."""
    if name not in _SETUPS:
        raise ValueError(f"unknown set-up {name!r}; known are {', '.join(NAMES)}")
    return _SETUPS[name](block_size=block_size)
