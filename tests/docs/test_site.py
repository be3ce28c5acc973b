"""The navigation, the API pages and the links of the documents; `make docs` builds the site itself."""

import importlib
import inspect
import pkgutil
import re
import runpy
from pathlib import Path

import pytest

import lft_jax

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ENTRY = re.compile(r"^\.\. (?:autofunction|autoclass|py:data):: (\S+)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
PACKAGES = [lft_jax, *(importlib.import_module(m.name) for m in pkgutil.walk_packages(lft_jax.__path__, "lft_jax."))]
PACKAGES = [package for package in PACKAGES if hasattr(package, "__all__")]


def entries():
    return [name for page in sorted(DOCS.glob("api/*.md")) for name in ENTRY.findall(page.read_text(encoding="utf-8"))]


def named(path):
    """What a dotted name stands for."""
    thing = lft_jax
    for part in path.split(".")[1:]:
        thing = getattr(thing, part) if hasattr(thing, part) else importlib.import_module(f"{thing.__name__}.{part}")
    return thing


def test_every_public_name_has_an_entry_in_the_api():
    listed = entries()
    assert len(listed) == len(set(listed)), "a name has two entries"
    documented = [named(name) for name in listed]
    missing = [
        f"{package.__name__}.{name}"
        for package in PACKAGES
        for name in package.__all__
        if not any(getattr(package, name) is thing for thing in documented)
        and not inspect.ismodule(getattr(package, name))
        and name != "__version__"
    ]
    assert not missing, f"add them to a page in docs/api: {missing}"


def test_every_entry_is_public():
    public = {f"{package.__name__}.{name}" for package in PACKAGES for name in package.__all__}
    public |= {f"lft_jax.learners.{name}" for name in vars(lft_jax.learners) if not name.startswith("_")}
    assert not set(entries()) - public


@pytest.fixture(scope="module")
def conf():
    return runpy.run_path(str(DOCS / "conf.py"))


def test_every_page_is_in_the_navigation(conf):
    patterns = [page for pages in conf["PARTS"].values() for page in pages]
    patterns += [page.removeprefix("/") for pages in conf["BELOW"].values() for page in pages]
    found = {page for pattern in patterns for page in DOCS.glob(f"{pattern}.*") if page.suffix in (".md", ".ipynb")}
    assert all(list(DOCS.glob(f"{pattern}.*")) for pattern in patterns)
    pages = {page for page in DOCS.rglob("*") if page.suffix in (".md", ".ipynb") and "_build" not in page.parts}
    assert {DOCS / "index.md", *found} == pages


def anchors(path):
    """Anchors of the headings of a page, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower() for title in titles]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in plain}


def documents():
    return [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *sorted(DOCS.rglob("*.md"))]


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere_on_github(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in LINK.findall(text):
        if "://" in link:
            assert re.fullmatch(r"https?://[\w.-]+\.\w+(/\S*)?", link), link
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_dead_links_of_a_site_are_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<h1 id="x"></h1><a href="b.html#y">b</a><a href="#x">here</a><a href="c.html"></a>'
    )
    (tmp_path / "b.html").write_text(
        '<a href="a.html#z"></a><a href="https://x.org/a"></a><img src="http://no where"/>'
    )
    check = runpy.run_path(str(ROOT / ".ci" / "check_links.py"))["broken_links"]
    assert check(tmp_path) == ["a.html: b.html#y", "a.html: c.html", "b.html: a.html#z", "b.html: http://no where"]
