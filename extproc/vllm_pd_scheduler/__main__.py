"""``python -m vllm_pd_scheduler``."""

from .cli import main

if __name__ == "__main__":
    main()
