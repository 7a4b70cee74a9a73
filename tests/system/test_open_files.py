"""The limit of open files is raised as far as it goes."""

import json
import subprocess
import sys

RAISES = """
import json, resource
from vllm_pd_scheduler.system.open_files import raise_open_files_limit
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
print(json.dumps([raise_open_files_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE)]))
"""


def raised(soft: int, hard: int) -> list[int]:
    code = RAISES.format(soft=soft, hard=hard)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return list(json.loads(ended.stdout))


def test_to_the_hard_limit() -> None:
    assert raised(100, 500) == [500, 500, 500]


def test_not_above_it() -> None:
    assert raised(300, 300) == [300, 300, 300]
