"""What the report says in words."""

from collections.abc import Mapping
from typing import Any

from lft_jax.auditing._plan import METHODS, radius

#: Lower bounds of success from which a verdict is the first or the second of three.
SEVERE, NOTABLE = 0.5, 0.1
#: Lower bound of the clean accuracy up to which the report asks whether the model is asked rightly.
DOUBTFUL = 0.5


def percent(value: float | None) -> str:
    """A share as text.

    Examples:
      >>> percent(0.8765), percent(None)
      ('88%', 'unknown')
    """
    return "unknown" if value is None else f"{100 * value:.0f}%"


def interval(found: Mapping[str, Any]) -> str:
    """A rate with its interval."""
    return f"{percent(found['rate'])} (95% interval {percent(found['low'])} to {percent(found['high'])})"


def ball(norm: str, epsilon: float) -> str:
    """A ball in words."""
    if norm == "linf":
        return f"no value of a pixel changes by more than {radius(epsilon)}"
    return f"the length of the change (l2) is at most {radius(epsilon, norm)}"


def support(found: Mapping[str, Any]) -> str:
    """From how many images, and how."""
    how = "with gradients" if found["gradients"] else f"by {found['evaluations']} evaluations of the model alone"
    return f"from {found['images']} image{'s' if found['images'] != 1 else ''}, {how}"


def doubtful(accuracy: Mapping[str, Any]) -> bool:
    """Whether a clean accuracy is not shown to be above one half: the model may be asked in a wrong way."""
    return accuracy["low"] <= DOUBTFUL


def doubt(accuracy: Mapping[str, Any]) -> str:
    """What to look for then."""
    return (
        f"Without a pattern, the model classifies only {percent(accuracy['rate'])} of {accuracy['images']} images as "
        "their labels say. If you know it to be better, one of mean, std, input_range, channels, output and labels is "
        "wrong, and these numbers mean nothing."
    )


def verdict(results: Mapping[str, Any]) -> dict[str, Any]:
    """The verdict: its grade, a headline and sentences."""
    found = results["headline"]
    rate, labelled = found["success"], results["settings"]["labelled"]
    grade = "severe" if rate["low"] >= SEVERE else "notable" if rate["low"] >= NOTABLE else "small"
    wrong = labelled and doubtful(results["clean_accuracy"])
    if wrong and grade == "small":
        grade = "doubtful"
    title = {
        "severe": "One pattern breaks this model on most images.",
        "notable": "One pattern breaks this model on a notable part of the images.",
        "small": "No pattern that was tried breaks this model on a notable part of the images.",
        "doubtful": "No pattern that was tried breaks this model, but it is wrong on many images without one.",
    }[grade]
    counted = "that it classifies correctly without it" if labelled else "(their answer changes)"
    sentences = [doubt(results["clean_accuracy"])] if wrong else []
    sentences.append(
        f"The same pattern, added to every image so that {ball(found['norm'], found['epsilon'])}, makes the model err "
        f"on {interval(rate)} of {rate['images']} unseen images {counted}. It was found {support(found)}."
    )
    if labelled:
        clean, after = results["clean_accuracy"], found["accuracy"]
        sentences.append(
            f"Accuracy falls from {interval(clean)} to {interval(after)}, on {clean['images']} unseen images."
        )
    spread = found["spread"]
    if spread["draws"] > 1:
        sentences.append(
            f"Over {spread['draws']} draws of these images, this attack reaches {percent(spread['least'])} to "
            f"{percent(spread['most'])} (mean {percent(spread['mean'])})."
        )
    if results["failures"]:
        sentences.append(f"{len(results['failures'])} of the planned attacks failed, so the success may be higher.")
    if grade in ("small", "doubtful"):
        sentences.append(
            "This is no proof of robustness: stronger attacks may exist, and other kinds of attacks were not tried."
        )
    return {"grade": grade, "title": title, "sentences": sentences}


def not_tried(results: Mapping[str, Any]) -> list[str]:
    """What the audit leaves open."""
    settings, found = results["settings"], []
    used = {cell["method"] for cell in results["cells"]}
    if not settings["differentiable"]:
        found.append(
            "Attacks with gradients: the model has none here. With the adapter of its framework (lft_jax.models), or "
            "on a copy of it (transfer), they may find more."
        )
    left = [method.title for name, method in METHODS.items() if name not in used]
    left = [title for title in dict.fromkeys(left) if title not in {METHODS[name].title for name in used}]
    left += ["estimates of the gradient by queries (uap-linf-query)", "queries for the class alone (decision)"]
    found.append(f"Attacks of this package that were left out: {', '.join(left)}.")
    radii = settings["epsilons"]
    known = [f"{norm} {', '.join(radius(value, norm) for value in values)}" for norm, values in radii.items() if values]
    found += [
        f"Other radii than {'; '.join(known)}, and other bounds (l1, few pixels, patches, rotation, blur, weather).",
        "Perturbations made for each image on its own, which are always at least as strong as universal ones.",
        "Attacks that know the defence, if there is one, such as random or not differentiable preprocessing.",
        "Attacks on the training data, and attacks through a camera or a printed picture.",
    ]
    targeted = results["targeted"]
    if targeted is not None:
        found.append(f"Targeted attacks towards other classes than number {targeted['target']}.")
    most = max(cell["images"] for cell in results["cells"])
    found.append(f"Attacks from more than {most} images, and settings tuned on this model: all settings are frozen.")
    return found
