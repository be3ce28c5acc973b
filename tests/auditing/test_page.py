"""The size of a page of large images, many classes, and what headless Chromium says of it."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest

import lft_jax
from lft_jax.auditing import AuditBudget, _page, _plots

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def report_of(side, channels, classes, count=60):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, side, side, channels), np.uint8)  # noise: the largest files
    weights = rng.normal(size=(16 * channels, classes)).astype(np.float32)

    def model(x):
        small = np.asarray(x).reshape(len(x), 4, side // 4, 4, side // 4, channels).mean((2, 4))
        return (small.reshape(len(x), -1) - 0.5) @ weights * side

    budget = AuditBudget((5,), (2,), (30,), 1, methods=("patterns",))
    return lft_jax.audit(model, images, epsilons=(0.2,), l2_epsilons=(), budget=budget, progress=False)


@pytest.mark.parametrize(("side", "channels"), [(300, 3), (224, 1), (28, 4)])
def test_pages_of_images_of_all_sizes_are_small(side, channels):
    page = report_of(side, channels, 30).html()
    assert len(page.encode()) < 2e6
    assert page.count("<img") == 3 + 2 * 12
    rows = re.search(r"<tbody>((?:(?!</tbody>).)*)</tbody>\s*</table></div>\s*<p class=\"note\">Rows", page, re.DOTALL)
    assert rows is not None and rows[1].count("<tr>") <= 12 and "others" in page


def test_a_matrix_of_many_classes_counts_all_images():
    rng = np.random.default_rng(0)
    pairs = {(int(i), int(j)): int(n) for i, j, n in rng.integers(1, 40, (300, 3))}
    results = {"classes": 40, "collapse": [[i, j, n] for (i, j), n in pairs.items()]}
    found = _page.matrix(results, _page._Names(None))
    assert found["more"] and len(found["rows"]) == 12 and len(found["columns"]) == 12
    for row in found["rows"]:
        counts = [n for (i, _), n in pairs.items() if str(i) == row["name"]]
        assert row["total"] == sum(counts) == sum(cell["count"] for cell in row["cells"])
        for name, cell in zip(found["columns"][:-1], row["cells"], strict=False):
            assert cell["count"] == pairs.get((int(row["name"]), int(name)), 0)
            assert cell["same"] == (name == row["name"])
    lost = {row["name"]: sum(c["count"] for c in row["cells"] if not c["same"]) for row in found["rows"]}
    others = {i: sum(n for (a, b), n in pairs.items() if a == i != b) for i in range(40)}
    assert min(lost.values()) >= max(value for i, value in others.items() if str(i) not in lost)


def test_names_of_classes():
    names = _page._Names(["cat", ""])
    assert [names(0), names(1), names(2), _page._Names(None)(3)] == ["0 cat", "1", "2", "3"]


def test_pictures_have_the_pixels_of_their_image():
    import base64
    import io

    from PIL import Image

    image = np.random.default_rng(0).uniform(size=(8, 6, 3))
    found = _plots.picture(image)
    kind, _, data = found["uri"].partition(",")
    assert kind == "data:image/png;base64" and (found["width"], found["height"]) == (6, 8)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    np.testing.assert_array_equal(pixels, np.rint(255 * image))
    large = _plots.picture(np.zeros((300, 150, 1)))
    assert large["uri"].startswith("data:image/jpeg") and (large["width"], large["height"]) == (112, 224)
    assert _plots.magnified(found, 112) == {**found, "width": 6 * 14, "height": 8 * 14, "smooth": False}
    assert _plots.magnified(large, 112) == {**large, "width": 56, "height": 112, "smooth": True}


@pytest.mark.parametrize(
    ("low", "high", "places"),
    [(100, 2000, [100, 200, 500, 1000, 2000]), (0.01, 50, [0.01, 0.1, 1, 10]), (3, 3, [3]), (0.4, 3, [0.5, 1, 2])],
)
def test_ticks_are_round_and_few(low, high, places):
    assert _plots._ticks(low, high) == places


@pytest.fixture
def chromium(tmp_path):
    """Runs headless Chromium on a page: what it prints, its log, and the addresses that were asked for."""

    def run(page, *flags):
        log = tmp_path / "net.json"
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
        command += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"]
        command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"]
        command += [f"--log-net-log={log}", *flags, page.as_uri()]
        found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        events = json.loads(log.read_text(encoding="utf-8"))["events"]
        asked = {event["params"]["url"] for event in events if "url" in event.get("params", {})}
        return found.stdout, found.stderr, {url for url in asked if not BROWSERS_OWN.match(url)}

    return run


#: What the browser asks for by itself.
BROWSERS_OWN = re.compile(r"https?://[\w.-]*\.(google|googleapis|gvt1|gstatic)\.com/")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")
def test_chromium_shows_the_page_without_errors_or_requests(tmp_path, chromium):
    report = report_of(32, 3, 10)
    report.save(tmp_path)
    text, log, asked = chromium(tmp_path / "index.html", "--dump-dom")
    assert report.results["verdict"]["sentences"][0] in text and "What was not tried" in text
    assert "CONSOLE" not in log, log
    assert not asked
    for width, height in ((1280, 2000), (390, 3000)):
        shot = tmp_path / f"{width}.png"
        _, log, _ = chromium(tmp_path / "index.html", f"--window-size={width},{height}", f"--screenshot={shot}")
        assert shot.stat().st_size > 50_000 and "CONSOLE" not in log
    chromium(tmp_path / "index.html", f"--print-to-pdf={tmp_path / 'page.pdf'}")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    # What a wrong page would show.
    wrong = tmp_path / "wrong.html"
    wrong.write_text("<script>console.error('seen')</script><img src='http://control.invalid/x.png'>")
    _, log, asked = chromium(wrong, "--dump-dom")
    assert "CONSOLE" in log and asked == {"http://control.invalid/x.png"}
