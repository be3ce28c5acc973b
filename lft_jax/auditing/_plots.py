"""Pictures of the page: curves as inline SVG that follows the colours of the page, images as PNG or JPEG."""

import base64
import io
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lft_jax.auditing._plan import METHODS, radius

#: Colour and marker of each attack: alike for both norms, and visible on light and dark.
STYLES = {
    "uap-linf": ("#d1495b", "o"),
    "uap-l2": ("#d1495b", "o"),
    "periodic": ("#3a86c8", "s"),
    "periodic-l2": ("#3a86c8", "s"),
    "momentum": ("#8a6fc0", "^"),
    "patterns": ("#2a9d6f", "D"),
    "patterns-l2": ("#2a9d6f", "D"),
    "spatial-linf": ("#c98a1b", "v"),
}
_INK, _LINE = "#0a0b0c", "#0d0e0f"  # become the colours of the page
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "text.parse_math": False,
}
#: Images with longer sides are JPEG.
LOSSLESS = 96
#: The longest side of an image in the page.
LONGEST = 224
#: The largest number of bytes of a JPEG, and the qualities that are tried for it; then it is halved.
MOST_BYTES, QUALITIES = 24_000, (90, 75, 55, 35)


def drawn(name: str, alt: str, draw: Callable[[Any], None], size: tuple[float, float] = (3.9, 2.9)) -> str:
    """One panel as an SVG element without prolog, that scales with the page.

    Args:
      name: what the identifiers in it begin with, unlike those of other panels.
      alt: what it shows, in words.
      draw: draws into a matplotlib axis.
      size: in inches.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        content = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(content, format="svg", transparent=True, metadata=nothing)
    svg = content.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace(_INK, "currentColor").replace(_LINE, "var(--line)")
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font: \1 var(--font)", svg)
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r"(href=\"|url\()#([\w-]+)", rf"\1#{name}-\2", svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    head = f'<svg {box[0]} role="img" aria-label="{_attribute(alt)}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    return re.sub(r"^<svg[^>]*>", head, svg).strip()


def _attribute(text):
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")


def accuracy(results: Mapping[str, Any]) -> str:
    """Clean accuracy and accuracy under the strongest attack in each ball."""
    bars = [("clean", results["clean_accuracy"], "#7d8590")] if results["clean_accuracy"] else []
    for threat in results["threats"]:
        name = f"{threat['norm']} {threat['radius']}"
        bars.append((name, threat["accuracy"], "#d1495b" if threat["norm"] == "linf" else "#3a86c8"))

    def draw(axis):
        for place, (_, rate, colour) in enumerate(bars):
            axis.barh(place, 100 * rate["rate"], color=colour, alpha=0.85, height=0.62)
            axis.plot([100 * rate["low"], 100 * rate["high"]], [place, place], color=_INK, linewidth=1.2)
            axis.text(100 * rate["high"] + 1.5, place, f"{100 * rate['rate']:.0f}%", va="center")
        axis.set_yticks(range(len(bars)), [name for name, _, _ in bars])
        axis.invert_yaxis()
        axis.set(xlim=(0, 108), xlabel="accuracy on query images, %")
        axis.grid(axis="x")
        axis.set_axisbelow(True)

    said = "; ".join(f"{name} {100 * rate['rate']:.0f}%" for name, rate, _ in bars)
    return drawn("accuracy", f"Accuracy: {said}", draw, (4.6, 0.7 + 0.3 * len(bars)))


def against(
    name: str,
    results: Mapping[str, Any],
    x: Callable[[Mapping[str, Any]], float | None],
    chosen: Callable[[Mapping[str, Any]], bool],
    label: str,
    *,
    log: bool = False,
    ticks: Mapping[float, str] | None = None,
) -> str | None:
    """Success rates of chosen cells against a quantity, one curve per attack; None if it has one value only.

    The band is the Wilson interval of the mean over draws, for the number of query images; dots are single draws.

    Args:
      name: of the panel.
      results: of the audit.
      x: the quantity of a cell, or None to leave it out.
      chosen: whether a cell is shown.
      label: of the quantity.
      log: whether its axis is logarithmic.
      ticks: `{place: label}` on its axis; None for round numbers on a logarithmic one.
    """
    curves: dict[str, list[tuple[float, Mapping[str, Any]]]] = {}
    for cell in results["cells"]:
        at = x(cell) if chosen(cell) and cell["target"] is None and cell["mean"] is not None else None
        if at is not None:
            curves.setdefault(cell["method"], []).append((at, cell))
    if len({place for points in curves.values() for place, _ in points}) < 2:
        return None

    def draw(axis):
        for method, points in curves.items():
            points.sort(key=lambda point: point[0])
            colour, marker = STYLES[method]
            places = [place for place, _ in points]
            mean, low, high = (np.asarray([100 * cell[k] for _, cell in points]) for k in ("mean", "low", "high"))
            axis.fill_between(places, low, high, color=colour, alpha=0.13, linewidth=0)
            if len(points) == 1:
                axis.plot(places * 2, [low[0], high[0]], color=colour, linewidth=1, alpha=0.5)
            axis.plot(places, mean, color=colour, marker=marker, markersize=4.5)
            dots = [(place, 100 * draw["success"]) for place, cell in points for draw in cell["draws"]]
            axis.plot(*zip(*dots, strict=True), ".", color=colour, markersize=3, alpha=0.6)
        if log:
            axis.set_xscale("log")
        places = [place for points in curves.values() for place, _ in points]
        shown = ticks if ticks is not None else {place: f"{place:g}" for place in _ticks(min(places), max(places))}
        axis.set_xticks(list(shown), list(shown.values()))
        axis.set_xticks([], minor=True)
        axis.set(ylim=(-2, 102), xlabel=label, ylabel="success (ASR), %")
        axis.grid()

    said = "; ".join(
        f"{METHODS[method].title}: " + ", ".join(f"{100 * cell['mean']:.0f}% at {place:.3g}" for place, cell in points)
        for method, points in curves.items()
    )
    return drawn(name, f"Success rate against {label}. {said}", draw)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers around a range, on a logarithmic axis: 1, 2 and 5 times powers of ten, or fewer of them."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        places = [float(f"{digit}e{decade}") for decade in decades for digit in digits]
        places = [place for place in places if 0.8 * low <= place <= 1.25 * high]
        if len(places) <= 6:
            break
    return places or [low]


def panels(results: Mapping[str, Any]) -> dict[str, Any]:
    """All curves of the page, and the legend."""
    standard, main = results["settings"]["standard"], results["headline"]["norm"]
    largest = max(results["settings"]["epsilons"][main])

    def size(cell):
        return standard["steps" if cell["gradients"] else "queries"]

    def of_standard(cell, norm=main):
        return cell["norm"] == norm and cell["images"] == standard["images"] and cell["size"] == size(cell)

    def of_series(cell):
        return cell["norm"] == main and cell["epsilon"] == largest and cell["images"] == standard["images"]

    def of_images(cell):
        return cell["norm"] == main and cell["epsilon"] == largest and cell["size"] == size(cell)

    found: dict[str, Any] = {"epsilon": []}
    for norm, radii in results["settings"]["epsilons"].items():
        panel = against(
            f"epsilon-{norm}",
            results,
            lambda cell: cell["epsilon"],
            lambda cell, norm=norm: of_standard(cell, norm),
            f"radius of the {norm} ball",
            ticks={value: radius(value, norm) for value in radii},
        )
        found["epsilon"] += [] if panel is None else [panel]
    steps = {cell["size"]: str(cell["size"]) for cell in results["cells"] if of_series(cell) and cell["gradients"]}
    found["steps"] = [
        against(
            "steps",
            results,
            lambda cell: cell["size"] if cell["gradients"] else None,
            of_series,
            "fine-tuning steps",
            log=True,
            ticks=steps,
        ),
        against("seconds", results, lambda c: c["seconds"], of_series, "wall time without compilation, s", log=True),
        against(
            "evaluations",
            results,
            lambda cell: cell["evaluations"],
            of_series,
            "evaluations on one image, a gradient as one",
            log=True,
        ),
    ]
    counts = {cell["images"]: str(cell["images"]) for cell in results["cells"] if of_images(cell)}
    found["images"] = [
        against("images", results, lambda c: c["images"], of_images, "support images", log=True, ticks=counts)
    ]
    found = {name: [panel for panel in part if panel] for name, part in found.items()}
    timed = any("wall time" in panel for panel in found["steps"])
    return {
        **found,
        "timed": timed,
        "legends": {"all": _legend(results, ("linf", "l2")), "main": _legend(results, (main,))},
    }


def _legend(results, norms):
    """Titles of the attacks in some balls, with their colours; those of one colour together."""
    there = {cell["method"] for cell in results["cells"] if cell["norm"] in norms}
    titles: dict[str, dict[str, None]] = {}
    for name, (colour, _) in STYLES.items():
        if name in there:
            titles.setdefault(colour, {})[METHODS[name].title] = None
    return [(", ".join(found), colour) for colour, found in titles.items()]


def picture(image: np.ndarray, lossless: bool | None = None) -> dict[str, Any]:
    """An image as a data URI, with its size.

    Args:
      image: `[H, W, C]` in [0, 1]; one or three channels are shown as they are, others by their mean.
      lossless: PNG; else JPEG. None for PNG of sides up to 96 pixels.
    """
    from PIL import Image

    pixels = np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)
    pixels = pixels if pixels.shape[-1] in (1, 3) else np.rint(pixels.mean(-1, keepdims=True)).astype(np.uint8)
    shown = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    height, width = pixels.shape[:2]
    if max(height, width) > LONGEST:
        scale = LONGEST / max(height, width)
        shown = shown.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BILINEAR)
    lossless = max(height, width) <= LOSSLESS if lossless is None else lossless
    content = io.BytesIO()
    if lossless:
        shown.save(content, "PNG", optimize=True)
    else:
        content, size = _jpeg(shown), shown.size
        while content.tell() > MOST_BYTES:
            size = size[0] // 2, size[1] // 2
            content = _jpeg(shown.resize(size, Image.Resampling.BILINEAR))
    kind, data = "png" if lossless else "jpeg", base64.b64encode(content.getvalue()).decode()
    return {"uri": f"data:image/{kind};base64,{data}", "width": shown.width, "height": shown.height}


def _jpeg(image):
    """The file of the best quality that is small enough, or else of the worst."""
    content = io.BytesIO()
    for quality in QUALITIES:
        content = io.BytesIO()
        image.save(content, "JPEG", quality=quality, subsampling=0)
        if content.tell() <= MOST_BYTES:
            break
    return content


def magnified(shown: dict[str, Any], wanted: int) -> dict[str, Any]:
    """A picture at a whole multiple of its size that is near the wanted one, or smaller: `smooth` says whether."""
    side = max(shown["width"], shown["height"])
    times = max(1, wanted // side) if side <= wanted else wanted / side
    size = {name: round(shown[name] * times) for name in ("width", "height")}
    return {**shown, **size, "smooth": times < 1}


def heat(values: np.ndarray) -> np.ndarray:
    """Magnitudes `[H, W]` as colours `[H, W, 3]`, on a logarithmic scale of three decades."""
    import matplotlib

    largest = float(values.max()) or 1.0
    levels = 1 + np.log10(np.maximum(values / largest, 1e-3)) / 3
    return np.asarray(matplotlib.colormaps["magma"](levels))[..., :3]


def middle(image: np.ndarray, side: int = LONGEST) -> np.ndarray:
    """The centre of an image, at most `side` pixels wide and high."""
    top, left = (max(0, (length - side) // 2) for length in image.shape[:2])
    return image[top : top + side, left : left + side]
