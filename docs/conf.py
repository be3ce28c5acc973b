"""Settings of the documentation site, which `make docs` builds. Why Sphinx: decisions/018-site.md."""

import functools
import inspect
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lft_jax  # noqa: E402

# The navigation. Pages have no `toctree` of their own, since they are read on GitHub too.
PARTS = {
    "Start": ["get_started", "concepts", "faq"],
    "Attack your model": ["frameworks/README", "attack", "queries", "audit", "models", "interop"],
    "Beyond attacks": ["defence", "own_tasks", "meta_training", "quickstart", "scaling"],
    "Notebooks": ["notebooks/README"],
    "Evidence": ["results", "protocol", "reliability", "performance", "victims", "decisions/README"],
    "Reference": ["api/README", "method", "layout", "contributing", "security", "changelog"],
}
FRAMEWORKS = ["jax", "pytorch", "keras", "onnx", "sklearn", "http"]
API = ["attack", "recipe", "models", "optimizers", "oracles", "tasks", "meta", "data", "evaluation"]
API += ["auditing", "defence", "interop"]
BELOW = {  # pages below a page; a `*` stands for all
    "frameworks/README": [f"/frameworks/{name}" for name in FRAMEWORKS],
    "notebooks/README": ["/notebooks/0*"],
    "results": ["/results/*"],
    "decisions/README": ["/decisions/0*"],
    "api/README": [f"/api/{name}" for name in API],
}
COPIES = {"contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md", "security": "SECURITY.md"}

project, author, copyright = "lft_jax", "the lft_jax developers", "the lft_jax developers; Apache-2.0"
version = release = lft_jax.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
# Headings have the anchors that GitHub gives them.
myst_heading_anchors = 4
# The outputs of the notebooks are committed, and tests/docs runs their sources.
nb_execution_mode = "off"

# In docstrings, what is in single backticks is a link where it is a public name, and code elsewhere.
default_role = "py:obj"
autodoc_typehints = "none"  # docstrings give shapes and units, which say more
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 80

html_theme = "sphinx_book_theme"
html_title = "lft_jax"
html_static_path = ["assets"]
html_css_files = ["style.css"]
html_copy_source = html_show_sourcelink = False
html_theme_options = {
    "home_page_in_toc": True,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "pygments_light_style": "tango",
    "pygments_dark_style": "github-dark",
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def _read(app, page, source):
    """Reads the documents of the root, and appends the part of the navigation that begins at a page."""
    if page in COPIES:
        text = (ROOT / COPIES[page]).read_text(encoding="utf-8")
        source[0] = text.replace("](docs/", "](").replace("](CHANGELOG.md", "](changelog.md")
    trees = [(f":caption: {title}", pages) for title, pages in PARTS.items()] if page == "index" else []
    if page in BELOW:
        trees = [(":glob:", BELOW[page])]
    if page == "results":  # whose titles are long
        names = sorted(path.stem for path in (ROOT / "docs" / "results").glob("*.md"))
        trees = [("", [f"{name} </results/{name}>" for name in names])]
    for option, pages in trees:
        source[0] += "\n\n```{toctree}\n:hidden:\n" + "\n".join([option, "", *pages]) + "\n```\n"


def _skip(app, what, name, thing, skip, options):
    """Leaves out the fields of classes, which their docstrings list, and fields under a former name."""
    if isinstance(thing, property):
        return None if inspect.isfunction(thing.fget) else True
    methods = functools.cached_property, classmethod, staticmethod
    return True if what == "class" and not (inspect.isroutine(thing) or isinstance(thing, methods)) else None


def setup(app):
    app.connect("source-read", _read)
    app.connect("autodoc-skip-member", _skip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
