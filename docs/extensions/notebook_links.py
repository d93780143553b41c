"""Links of notebooks, which are files of the repository, as links of the site.

What they say of each other leads to pages; what lies outside of the site is only named.
"""

import re
from typing import Any


def on_site(source: str) -> str:
    """The source of a notebook with links that the site can follow."""
    named = re.sub(r"\[([^\]]+)\]\(\.\./[^)]+\)", r"\1", source)
    return re.sub(r"\[([^\]]+)\]\((\w+)\.py\)", r"{doc}`\1 </notebooks/\2>`", named)


def _read(app: Any, docname: str, source: list[str]) -> None:
    if docname.startswith("notebooks/"):
        source[0] = on_site(source[0])


def setup(app: Any) -> dict[str, bool]:
    app.connect("source-read", _read)
    return {"parallel_read_safe": True}
