"""What `make docs` does to the pages, which are written for who reads them in the repository."""

import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\(\.\./(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
PARAGRAPH = re.compile(r"(?<=\n\n)  (?=[^\s-])")  # of a list item: two columns are enough elsewhere, not for the site
MARK = re.compile(r"^```python \w+$", re.MULTILINE)  # tells tests what to do with a block


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """
    Links to files that the site does not have lead into the repository, and lists are as the site's Markdown wants
    them.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    root, address = Path(config["docs_dir"]).parent, config["repo_url"].rstrip("/")

    def elsewhere(link: re.Match) -> str:
        path = link["path"].rstrip("/")
        if not (root / path).exists():
            raise FileNotFoundError(f"{page.file.src_uri} has a link to {path}, which is not there.")
        kind = "raw" if link["image"] else "blob"
        return f"{link['image']}[{link['text']}]({address}/{kind}/main/{path}{link['anchor'] or ''})"

    parts = FENCED.split(LINK.sub(elsewhere, markdown))
    parts = [MARK.sub("```python", part) if i % 2 else PARAGRAPH.sub("    ", part) for i, part in enumerate(parts)]
    return "".join(parts)
