"""Hook of mkdocs: links that leave the documents lead to the repository, or are plain text where it is unknown."""

import os
import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)#\s]*)(#[^)\s]*)?\)")
"""A link that begins with `../`: its text, path and anchor."""


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite the page's links to files outside of the documents, in `main` of `repo_url`."""
    documents = Path(config.docs_dir)

    def rewritten(link: re.Match[str]) -> str:
        text, path, anchor = link.group(1), link.group(2), link.group(3) or ""
        target = Path(os.path.normpath(documents / Path(page.file.src_uri).parent / path))
        if target.is_relative_to(documents):
            return link.group()
        if not config.repo_url:
            return text
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{target.relative_to(documents.parent)}{anchor})"

    return LINK.sub(rewritten, markdown)
