"""How to install what only some commands need: the package's extras."""

from __future__ import annotations

import re
import shlex
import sys
from importlib.metadata import PackageNotFoundError, requires

_NAME = "vllm-pd-scheduler"


def install_command(extra: str) -> str:
    """Return the command that installs an extra, for the Python that runs this.

    It names the packages, not the extra: so it works for a wheel and in a clone, in whatever directory.
    """
    pip = f"{shlex.quote(sys.executable)} -m pip install"
    try:
        found = requires(_NAME) or []
    except PackageNotFoundError:  # run from a directory on PYTHONPATH
        found = []
    marker = re.compile(rf"""extra == ['"]{extra}['"]""")
    names = [shlex.quote(each.partition(";")[0].strip()) for each in found if marker.search(each)]
    return " ".join((pip, *names)) if names else f"{pip} '.[{extra}]' (in the clone)"
