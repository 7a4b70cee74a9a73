"""What mkdocs needs beyond its settings: pages that lie outside ``docs/``, and docstrings in Markdown.

In the repository a link is relative to the file that it stands in. On the site ``docs/`` is the root, and the
pages of ``OUTSIDE`` lie beside those of ``docs/``; links between them are turned here.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
OUTSIDE = (
    *("deploy/README.md", "deploy/helm/vllm-pd-scheduler/README.md"),
    *("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "envoy/envoy.yaml"),
)

_LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)")
_ROLE = re.compile(r":[a-z]+:<code>(~?)([\w.]+)</code>")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages outside ``docs/``."""
    for path in OUTSIDE:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn relative links from their place in the repository to their place on the site."""
    here = page.file.src_uri
    folder = posixpath.dirname(here if here in OUTSIDE else f"docs/{here}")

    def turned(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[1])).removeprefix("docs/")
        return f"]({posixpath.relpath(target, posixpath.dirname(here) or '.')}"

    return _LINK.sub(turned, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Show a name in a docstring (``:class:`~package.Name```) as code: the last part where it has a ``~``."""
    return _ROLE.sub(lambda role: f"<code>{role[2].split('.')[-1] if role[1] else role[2]}</code>", html)
