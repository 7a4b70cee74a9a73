"""What tests have made or downloaded once, for all clones of this user."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """Return what is kept under a name, made now if it is not there; one that was cut short is not kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-pd-scheduler-tests"
    found = cache / name
    if not found.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as directory:
            make(Path(directory) / name)
            try:
                os.replace(Path(directory) / name, found)
            except OSError:
                if not found.exists():  # else another process was faster, and has made a directory
                    raise
    return found
