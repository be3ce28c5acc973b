"""Section and figure of the study of attacks by queries."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.report.figures import plt, save
from experiments.report.origins import origin

#: Methods of the study.
METHODS = {
    "patterns": '`lft_jax.PatternAttack`, what `oracle="query"` is',
    "race": "its race alone",
    "decision": '`oracle="decision"`: only the predicted class is seen',
    "tiles": "the best of random 2x2 tiles",
    "waves": "the best of random plane waves, every second one alike in all channels",
    "perlin": "Perlin noise, Bayesian optimisation (Co et al. 2019, arXiv 1810.00470), up to 1,000 evaluations",
    "gabor": "Gabor noise, in the same way",
    "simba-pixels": "steps along one pixel or against it, kept if the loss falls (after SimBA, arXiv 1905.07121)",
    "simba-dct": "the same along low frequencies of a discrete cosine transform",
    "zo-signsgd": "momentum sign steps along zeroth-order estimates, six directions per image",
    "uap-linf-query": "the pretrained rule, with 40% of the evaluations for a plane wave",
}


def queries_section(results: Mapping[str, Any], path: str, figures: str) -> str:
    """Attacks by queries alone, against the evaluations made."""
    about, rows = results["about"], results["rows"]
    budgets = sorted({row["budget"] for row in rows})
    names = [name for name in METHODS if any(row["method"] == name for row in rows)]
    lines = [
        f"## Attacks by queries alone on `{about['model']}`",
        "",
        "Attack success rate, %, mean ± 95% interval over draws of the support images (the number of draws in "
        f"brackets), after so many evaluations of the model on one image in all, on those of {about['queries']} unseen "
        f"images of {about['source']} that are right when clean ({100 * results['clean_accuracy']:.1f}%), in an "
        f"{about['norm']} ball of {about['epsilon']:.4g}. Ten support images, one of each class where there are ten. "
        f"Role of the model: {about['role']}. {origin(results, path)}",
        "",
        "| method | " + " | ".join(f"{budget:,}" for budget in budgets) + " |",
        "|---" * (1 + len(budgets)) + "|",
    ]
    for name in names:
        found = {row["budget"]: row for row in rows if row["method"] == name}
        cells = [_rate(found[b]) if b in found else "" for b in budgets]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    lines += ["", *_differences(rows, names, budgets)]
    lines += [f"- `{name}`: {METHODS[name]}." for name in names]
    return "\n".join([*lines, "", f"![success rate against evaluations]({figures}.png)", "", ""])


def _rate(row):
    width = "" if row["asr_interval"] is None else f" ± {100 * row['asr_interval']:.1f}"
    return f"{100 * row['asr']:.1f}{width} ({len(row['draw_asr'])})"


def _differences(rows, names, budgets):
    """The table of paired differences to the reference, if there are any."""
    found = {(row["method"], row["budget"]): row["difference"] for row in rows if "difference" in row}
    if not found:
        return []
    lines = [f"Minus `{next(iter(found.values()))['to']}`, paired by draw:", ""]
    lines += ["| method | " + " | ".join(f"{b:,}" for b in budgets) + " |", "|---" * (1 + len(budgets)) + "|"]
    for name in names:
        pairs = [found.get((name, budget)) for budget in budgets]
        if any(pairs):
            widths = ["" if not p or p["interval"] is None else f" ± {100 * p['interval']:.1f}" for p in pairs]
            cells = [f"{100 * p['asr']:+.1f}{w}" if p else "" for p, w in zip(pairs, widths, strict=True)]
            lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return [*lines, ""]


def draw_queries(results: Mapping[str, Any], path: Path) -> None:
    """Success against evaluations, one curve for each method, with intervals over draws."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for i, name in enumerate(METHODS):
        rows = sorted((row for row in results["rows"] if row["method"] == name), key=lambda row: row["budget"])
        if not rows:
            continue
        budgets, rates = [row["budget"] for row in rows], [100 * row["asr"] for row in rows]
        style = {"color": f"C{i % 10}", "marker": "os^"[i // 4], "linestyle": ("-", "--", ":")[i // 4]}
        axes.plot(budgets, rates, label=name, markersize=4, **style)
        if name in ("patterns", "decision") and all(row["asr_interval"] is not None for row in rows):
            widths = [100 * row["asr_interval"] for row in rows]
            low, high = zip(*((r - w, r + w) for r, w in zip(rates, widths, strict=True)), strict=True)
            axes.fill_between(budgets, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axes.set(xscale="log", xlabel="evaluations of the model on one image", ylabel="success on unseen images, %")
    axes.set_xticks(ticks := sorted({row["budget"] for row in results["rows"]}), [f"{b:,}" for b in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    save(figure, path)
