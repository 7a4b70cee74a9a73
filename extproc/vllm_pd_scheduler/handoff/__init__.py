"""The KV hand-off from prefill to decode: the prefill request, and what frees a hand-off nobody uses."""
