"""Draws docs/assets/incongruous.svg: python docs/assets/draw_concepts.py. Its colours suit light and dark pages."""

import random
from pathlib import Path

GREY, BLUE, ORANGE, GREEN = "#7d8791", "#3f88c5", "#e07a3f", "#4a9c6d"
TASKS = (("digits", "8x8x1", 4, 1), ("MNIST", "28x28x1", 7, 1), ("CIFAR-10", "32x32x3", 8, 3))


def text(x, y, words, size=14, anchor="middle", colour=GREY, weight="normal"):
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{colour}" font-weight="{weight}">'
        f"{words}</text>"
    )


def arrow(path, colour, dashed=False):
    dash = ' stroke-dasharray="6 5"' if dashed else ""
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2.5"{dash} marker-end="url(#{colour[1:]})"/>'


def grid(x, y, cells, layers, shade):
    """A perturbation as squares of 64 / 8 pixels, a layer for each channel."""
    side, parts = 8, []
    for layer in reversed(range(layers)):
        left, top = x + 7 * layer, y - 7 * layer
        for row in range(cells):
            for column in range(cells):
                colour = (ORANGE, BLUE)[shade(row, column, layer)]
                place = f'x="{left + side * column}" y="{top + side * row}"'
                parts.append(f'<rect {place} width="{side}" height="{side}" fill="{colour}"/>')
        size = side * cells
        box = f'x="{left}" y="{top}" width="{size}" height="{size}"'
        parts.append(f'<rect {box} fill="none" stroke="{GREY}"/>')
    return "".join(parts)


def draw():
    noise = random.Random(1)
    parts = [
        text(95, 24, "tasks", 16, weight="bold"),
        text(300, 24, "one learned fine-tuner", 16, colour=GREEN, weight="bold"),
        text(505, 24, "after K steps", 16, weight="bold"),
    ]
    for number, (name, shape, cells, layers) in enumerate(TASKS):
        y = 44 + 112 * number + (20 if layers > 1 else 0)
        middle = y + 32
        top = middle - 4 * cells
        parts += [
            text(14, middle - 4, name, 14, "start"),
            text(14, middle + 14, shape.replace("x", "&#215;"), 13, "start"),
            grid(98 - (cells - 4) * 4 + 8, top, cells, layers, lambda *_: noise.randrange(2)),
            arrow(f"M 172 {middle} H 216", BLUE),
            arrow(f"M 384 {middle} H 428", ORANGE),
            grid(472 - (cells - 4) * 4, top, cells, layers, lambda r, c, k: (r + c + k) // 2 % 2),
        ]
        parts += [
            text(194, middle - 10, "gradient", 12, colour=BLUE),
            text(406, middle - 10, "update", 12, colour=ORANGE),
        ]
    parts += [
        f'<rect x="222" y="44" width="156" height="316" rx="14" fill="{GREEN}" fill-opacity=".12" stroke="{GREEN}" '
        'stroke-width="2.5"/>',
        text(300, 168, "a small LSTM with", 14, colour=GREEN),
        text(300, 187, "the same weights", 14, colour=GREEN),
        text(300, 206, "at every coordinate", 14, colour=GREEN),
        text(300, 225, "or period", 14, colour=GREEN),
        arrow("M 505 372 V 402 H 300 V 368", GREY, dashed=True),
        text(402, 424, "loss on query images → meta-gradient", 14),
    ]
    heads = "".join(
        f'<marker id="{c[1:]}" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="5" markerHeight="5" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{c}"/></marker>'
        for c in (GREY, BLUE, ORANGE)
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 436" width="600" height="436" '
        'font-family="system-ui, Helvetica, Arial, sans-serif">'
        f"<title>Three tasks of different shapes, fine-tuned by one rule</title><defs>{heads}</defs>"
        f"{''.join(parts)}</svg>\n"
    )


if __name__ == "__main__":
    Path(__file__).with_name("incongruous.svg").write_text(draw(), encoding="utf-8")
