"""The documentation site: `make docs` builds it into build/docs."""

import hashlib
import os
import sys
from pathlib import Path

import jaxmerge

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "extensions"))
# The commands in how-to pages are those of the environment that builds the site.
# Kernels pass for terminals, on which progress would be drawn line by line.
bin_directory = str(Path(sys.executable).parent)
os.environ["PATH"] = os.pathsep.join([bin_directory, os.environ["PATH"]])
os.environ |= {"TTY_COMPATIBLE": "0", "COLUMNS": "100"}

project = "jaxmerge"
copyright = "the authors of jaxmerge"
release = jaxmerge.__version__
html_title = f"jaxmerge {release}"
html_theme = "furo"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "docstrings",
    "notebook_links",
    "registry_pages",
]
exclude_patterns = ["conf.py", "extensions"]
# Notebooks are Python files with comments between cells; there may be none yet.
nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}

# Every code cell runs, again only when its page or the library has changed, and must
# not fail.
sources = sorted(Path(jaxmerge.__file__).parent.rglob("*.py"))
version = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE.parent / "build" / "docs-cells" / version[:12])
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 900
nb_merge_streams = True

myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
# What types there may be is said in words, next to what they mean.
autodoc_typehints = "none"
napoleon_use_ivar = True
napoleon_use_rtype = False
default_role = "code"
