"""Names that look like HTML stay text on the page and in junit.xml."""

import html.parser
import xml.etree.ElementTree as ElementTree

import numpy as np

import lft_jax
from lft_jax.auditing import AuditBudget

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style></title><svg onload=alert(1)>",
    "a & b &lt;i&gt; {{ 7 * 7 }} {% raw %} $x^2$ \\frac",
    "javascript:alert(1)",
)


class Elements(html.parser.HTMLParser):
    """All elements with the names of their attributes, and the text."""

    def __init__(self, page):
        super().__init__()
        self.found, self.text, self.values = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, tuple(sorted(name for name, _ in attrs))))
        self.values += [value or "" for name, value in attrs if name in ("href", "src", "action")]

    def handle_data(self, data):
        self.text.append(data)


def pages(names, folder):
    """The page and junit.xml of an audit whose classes, files, model and data have these names."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 8, 8, 3), np.uint8)
    weights = rng.normal(size=(192, 6)).astype(np.float32)

    def model(x):
        return (np.asarray(x).reshape(len(x), -1) - 0.5) @ weights

    about = {"model": names[0], "data": names[1], "command": names[2], "commit": names[3]}
    report = lft_jax.audit(
        model,
        images,
        class_names=names,
        image_names=[names[i % len(names)] for i in range(len(images))],
        about=about,
        epsilons=(0.2,),
        l2_epsilons=(),
        budget=AuditBudget((5,), (2,), (30,), 1, methods=("patterns",)),
        progress=False,
    )
    report.save(folder)
    return [(folder / name).read_text(encoding="utf-8") for name in ("index.html", "junit.xml")]


def test_names_stay_text(tmp_path):
    page, junit = pages(HOSTILE, tmp_path / "hostile")
    plain, _ = pages(["cat", "dog", "car", "sea", "sun", "egg"], tmp_path / "plain")
    found, expected = Elements(page), Elements(plain)
    assert found.found == expected.found  # the same elements and attributes, in the same order
    assert not {"script", "iframe", "object", "embed", "form", "base"} & {tag for tag, _ in found.found}
    assert not [name for _, names in found.found for name in names if name.startswith("on")]
    assert all(value.startswith("data:") or value.startswith("#") for value in found.values)
    text = "".join(found.text)
    assert all(name in text for name in HOSTILE)
    assert "default-src 'none'" in page and "{{ 7 * 7 }}" in text
    tree = ElementTree.fromstring(junit.partition("\n")[2])
    assert {element.tag for element in tree.iter()} <= {
        "testsuite", "properties", "property", "testcase", "failure", "error", "system-out",
    }  # fmt: skip
