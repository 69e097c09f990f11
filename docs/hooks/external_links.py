"""Lists the links that leave the site.  They are not fetched: a build must not depend on other hosts."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from typing import Any

log = logging.getLogger("mkdocs.hooks.external_links")
LINK = re.compile(r'href="(https?://[^"]+)"')
found: dict[str, set[str]] = defaultdict(set)


def on_page_content(html: str, *, page: Any, **_: Any) -> str:
    for address in LINK.findall(html):
        found[address].add(page.file.src_uri)
    return html


def on_post_build(**_: Any) -> None:
    listed = "\n".join(f"  {address} ({', '.join(sorted(pages))})" for address, pages in sorted(found.items()))
    log.info(f"{len(found)} external links, not fetched:\n{listed}")
