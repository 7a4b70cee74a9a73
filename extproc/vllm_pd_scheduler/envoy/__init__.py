"""All that speaks with Envoy: ext_proc, EDS, its access log and its process."""
