from prometheus_client.parser import text_string_to_metric_families

from tests.support.sim import Client
from tests.support.sim_fleet import Fleet

NAMES = [
    "num_requests_running",
    "num_requests_waiting",
    "num_requests_waiting_by_reason",
    "kv_cache_usage_perc",
    "engine_sleep_state",
    "cache_config_info",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "num_preemptions",
    "prompt_tokens",
    "prompt_tokens_by_source",
    "generation_tokens",
    "request_success",
    "external_prefix_cache_queries",
    "external_prefix_cache_hits",
    "nixl_num_failed_transfers",
    "nixl_num_kv_expired_reqs",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_inference_time_seconds",
    "e2e_request_latency_seconds",
    "nixl_xfer_time_seconds",
    "nixl_bytes_transferred",
]


async def test_names_and_labels_are_vllms(fleet: Fleet, client: Client) -> None:
    families = {each.name: each for each in text_string_to_metric_families(await _scrape(fleet, client))}
    assert set(families) >= {f"vllm:{name}" for name in NAMES} | {"process_start_time_seconds"}
    for name, family in families.items():
        for sample in family.samples:
            if name.startswith("vllm:"):
                assert sample.labels["engine"] == "0"
            if name.startswith("vllm:") and name != "vllm:cache_config_info":
                assert sample.labels["model_name"] == "sim-model"
    (config,) = families["vllm:cache_config_info"].samples
    assert config.labels["enable_prefix_caching"] == "True"
    assert {"block_size", "num_gpu_blocks", "kv_cache_size_tokens"} <= set(config.labels)


async def test_a_request_is_counted(fleet: Fleet, client: Client) -> None:
    instance = fleet["prefill-1"]
    names = [
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:time_to_first_token_seconds_count",
        "vllm:inter_token_latency_seconds_count",
        "vllm:e2e_request_latency_seconds_count",
    ]
    before = [await client.metric(instance, name) for name in names]
    await client.text(instance, {"prompt": "x" * 40, "max_tokens": 5})
    after = [await client.metric(instance, name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [10, 5, 1, 4, 1]


async def _scrape(fleet: Fleet, client: Client) -> str:
    return str(await client.get(fleet["decode-0"], "/metrics"))
