"""Tables of docs/reliability.md, from what `make trust` merges."""

from collections.abc import Mapping
from typing import Any

#: Parts of results/reliability.json, with what they are called.
PARTS = {
    "kills": "runs that are killed",
    "properties": "properties",
    "gradients": "meta-gradients",
    "fuzz": "damaged and hostile files",
    "soak": "load",
}
#: Quantities of a soak, with their units.
QUANTITIES = {
    "rss": "resident memory, MiB",
    "heap": "of which in the C heap, MiB",
    "arrays": "arrays of JAX, MiB",
    "programs": "compiled programs",
    "descriptors": "file descriptors",
    "threads": "threads",
    "models": "deleted models in memory",
}


def reliability_section(results: Mapping[str, Any], path: str) -> str:
    """An overview of all parts, and a table for each that ran."""
    parts = results["parts"]
    lines = [
        f"From `{path}`, which `make trust` writes. Parts keep the commit that they ran at.",
        "",
        "| | tried | outcome | command | commit | date |",
        "|---|---|---|---|---|---|",
    ]
    for name, title in PARTS.items():
        part = parts.get(name, {"state": "missing"})
        if "results" not in part:
            lines.append(f"| {title} | | **{part['state']}** | | | |")
            continue
        tried, outcome = _OVERVIEW[name](part["results"])
        outcome = outcome if part["state"] == "passed" else f"**{part['state']}**: {outcome}"
        command = part["command"].replace(".__main__", "")
        lines.append(f"| {title} | {tried} | {outcome} | `{command}` | {part['commit']} | {part['date']} |")
    for name, table in _TABLES.items():
        if "results" in parts.get(name, {}):
            lines += ["", f"### Measured: {PARTS[name]}", "", *table(parts[name]["results"])]
    return "\n".join([*lines, ""])


def _kills(found):
    kills = found["kills"]
    equal = "the numbers of an uninterrupted run, bit for bit" if found["bit_equal"] else "other numbers"
    lost = f"at most {found['most_meta_steps_lost']} meta-steps lost of a checkpoint every {found['checkpoint_every']}"
    return f"{kills['tried']:,} kills", f"{kills['survived']:,} survived; {equal}; {lost}"


def _kills_table(found):
    lines = ["| killed during | kills | survived |", "|---|---|---|"]
    return lines + [f"| {name} | {n['tried']:,} | {n['survived']:,} |" for name, n in found["by_phase"].items()]


def _gradients(found):
    worst = f"worst error {found['worst']['error']:.1e}, relative"
    return f"{found['cells']:,} cells", f"{worst}; {found['failures']:,} above {found['tolerance']:g}"


def _gradients_table(found):
    lines = [
        "Slopes along random directions, relative to their norm. A cell is a rule, its features, an oracle, a learner "
        f"and a constraint; {sum(found['refused'].values()):,} combinations are refused with an error.",
        "",
        "| | | cells | worst error |",
        "|---|---|---|---|",
    ]
    for axis, entries in found["by"].items():
        lines += [f"| {axis} | `{name}` | {n['cells']:,} | {n['worst']:.1e} |" for name, n in entries.items()]
    return lines


def _outcomes(found):
    total: dict[str, int] = {}
    for counts in found["targets"].values():
        for outcome, count in counts.items():
            total[outcome] = total.get(outcome, 0) + count
    return total


def _fuzz(found):
    total = _outcomes(found)
    others = sum(count for outcome, count in total.items() if outcome not in ("accepted", "refused"))
    said = f"{total['refused']:,} refused as documented, {total['accepted']:,} harmless, {others:,} others"
    return f"{found['inputs']:,} inputs", said


def _fuzz_table(found):
    names = list(_outcomes(found))
    lines = [
        "Accepted: what was read is valid. Refused: an exception that the docstring names. Nothing else may come.",
        "",
        "| reader | " + " | ".join(names) + " |",
        "|---" * (1 + len(names)) + "|",
    ]
    for target, counts in found["targets"].items():
        lines.append(f"| `{target}` | " + " | ".join(f"{counts[name]:,}" for name in names) + " |")
    return lines


def _properties(found):
    cases = sum(one["cases"] for one in found["properties"].values())
    return f"{len(found['properties'])} properties, {cases:,} cases", f"{found['failures']:,} failed"


def _properties_table(found):
    lines = ["| property | cases | |", "|---|---|---|"]
    for name, one in found["properties"].items():
        outcome = f"{one['failures']:,} failed" if one["failures"] else "holds"
        lines.append(f"| {name} | {one['cases']:,} | {outcome} |")
    return lines


def _slope(line):
    return f"{line['slope']:+.1f} ({line['low']:+.1f} to {line['high']:+.1f})"


def _soak(found):
    memory = _slope(found["quantities"]["rss"]["per_1000_attacks"])
    tried = f"{found['attacks']:,} attacks, {found['meta_steps']:,} meta-steps, {found['seconds'] / 60:.0f} minutes"
    return tried, f"memory {memory} MiB in 1,000 attacks"


def _soak_table(found):
    lines = [
        f"After the first {found['warm_up_attacks']:,} attacks, in which each program is compiled for the first time. "
        "Slopes by least squares, with 95% intervals.",
        "",
        "| | first | last | lowest | highest | in 1,000 attacks |",
        "|---|---|---|---|---|---|",
    ]
    for name, title in QUANTITIES.items():
        if name in found["quantities"]:
            one = found["quantities"][name]
            ends = " | ".join(f"{one[end]:,.1f}".removesuffix(".0") for end in ("first", "last", "lowest", "highest"))
            lines.append(f"| {title} | {ends} | {_slope(one['per_1000_attacks'])} |")
    return lines


_OVERVIEW = {"kills": _kills, "properties": _properties, "gradients": _gradients, "fuzz": _fuzz, "soak": _soak}
_TABLES = {
    "kills": _kills_table,
    "properties": _properties_table,
    "gradients": _gradients_table,
    "fuzz": _fuzz_table,
    "soak": _soak_table,
}
