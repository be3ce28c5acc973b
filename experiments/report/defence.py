"""Section of the study of universal adversarial training."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.report.origins import origin

#: Hardenings of the study.
HARDENINGS = {
    "none": "trained on clean images",
    "further clean epochs": "as many more epochs as the hardened networks have, on clean images",
    "patterns alone": "`lft_jax.defence.harden` whose perturbations stay the searched patterns that they begin with",
    "learned": "`lft_jax.defence.harden`: the rule on pixels inside, several perturbations that begin again",
    "learned on periods": "the same with the rule on periods, `uap-linf`",
    "one perturbation": "the same with one perturbation throughout, moved by sign steps (after arXiv 1811.11304)",
}
#: Attacks of the study.
ATTACKS = {
    "uap-linf": "`lft_jax.universal_perturbation` with its defaults: the shipped rule, 20 steps",
    "sign steps": "momentum sign steps on the images as they are, 20 steps",
    "patterns by queries": '`oracle="query"`, 1,000 evaluations in all',
    "sign steps on many images": "100 momentum sign steps on minibatches of 64",
}


def defence_section(results: Mapping[str, Any], path: str, figures: str) -> str:
    """Clean accuracy and success of fresh attacks, with and without defences."""
    del figures
    about, rows = results["about"], results["rows"]
    support = f"one validation image of each class ({about['many']:,} for the attack on many images)"
    lines = [
        f"## Defences of a small CNN on {about['source']}",
        "",
        "Success of attacks (ASR), %, mean ± 95% interval over draws of the support images, on "
        f"{about['queries']:,} test images, in an {about['norm']} ball of {about['epsilon']:.4g}. Support images: "
        f"{support}. {origin(results, path)}",
        "",
        *_resumed(results),
        f"Hardening is {about['epochs']} more epochs, {about['fraction']:.0%} of each minibatch perturbed.",
        "",
        *_table(rows, "hardening", "hardening", ATTACKS),
    ]
    there = {row["defence"] for row in rows if row["part"] == "hardening"}
    lines += [f"- Hardening `{name}`: {text}." for name, text in HARDENINGS.items() if name in there]
    lines += [f"- Attack `{name}`: {text}." for name, text in ATTACKS.items()]
    if any(row["part"] == "art" for row in rows):
        names = {"uap-linf": "made on the plain model", "patterns by queries": "made through the preprocessor"}
        lines += [
            "",
            "Preprocessors of the Adversarial Robustness Toolbox before the plain model: perturbations by `uap-linf` "
            "that were made on the model without them, and by queries (1,000 evaluations) through them:",
            "",
            *_table(rows, "art", "preprocessor", names),
        ]
    if results.get("audits"):
        lines += ["", *_audits(results["audits"])]
    return "\n".join([*lines, "", ""])


def _resumed(results):
    """A line on the commits at which rows were added."""
    commits = results["provenance"].get("resumed_at_commits")
    return [f"Rows were added at commit {', '.join(commits)}.", ""] if commits else []


def defence_summary(found: Sequence[Mapping[str, Any]]) -> str:
    """The tables of several results files, for docs/defence.md."""
    lines = []
    for results in found:
        about = results["about"]
        radius = f"{round(255 * about['epsilon'])}/255" if about["epsilon"] < 0.1 else f"{about['epsilon']:.4g}"
        lines += [
            f"**{about['source']}**, linf {radius}, {about['epochs']} more epochs "
            f"([page](results/defence-{about['source']}.md)):",
            "",
            *_table(results["rows"], "hardening", "hardening", ATTACKS),
        ]
        if results.get("audits"):
            lines += [*_audits(results["audits"]), ""]
    return "\n".join(lines) + "\n"


def _audits(audits):
    """Lines of a table: an audit in each row, with the attack that its choice images call the strongest."""
    split = next(iter(audits.values()))["split"]
    lines = [
        f"Audits (`lft_jax.audit`) on {sum(split.values()):,} test images: {split['query']:,} judge the attack that "
        "others chose. Success with its 95% interval over these:",
        "",
        "| hardening | radius | clean accuracy | strongest attack | success (ASR) | accuracy under attack | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in audits.items():
        for threat in found["threats"]:
            last = threat is found["threats"][-1]
            rates = [_percent(found["clean_accuracy"]), threat["short"], _interval(threat["success"])]
            cells = [name, threat["radius"], *rates, _percent(threat["accuracy"]), found["verdict"] if last else ""]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _percent(rate):
    return f"{100 * rate['rate']:.1f}"


def _interval(rate):
    return f"{_percent(rate)} ({100 * rate['low']:.1f} to {100 * rate['high']:.1f})"


def _table(rows, part, title, attacks):
    """Lines of a table: a row for each defence, a column for each attack."""
    found = {(row["defence"], row["attack"]): row for row in rows if row["part"] == part}
    defences = list(dict.fromkeys(defence for defence, _ in found))
    defences.sort(key=lambda name: list(HARDENINGS).index(name) if part == "hardening" else 0)
    shown = [name for name in attacks if any(attack == name for _, attack in found)]
    titles = [attacks[name] if part == "art" else f"`{name}`" for name in shown]
    lines = [f"| {title} | clean accuracy | " + " | ".join(titles) + " |", "|---" * (2 + len(shown)) + "|"]
    for defence in defences:
        clean = next(row["clean_accuracy"] for (name, _), row in found.items() if name == defence)
        cells = [_rate(found[defence, name]) if (defence, name) in found else "" for name in shown]
        lines.append(f"| {defence} | {100 * clean:.1f} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _rate(row):
    width = "" if row["asr_interval"] is None else f" ± {100 * row['asr_interval']:.1f}"
    return f"{100 * row['asr']:.1f}{width}"
