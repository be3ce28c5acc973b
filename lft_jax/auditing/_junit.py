"""The verdict as JUnit XML, which CI pipelines show."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from typing import Any

from lft_jax.auditing import _words


def exceeds(results: Mapping[str, Any], fail_above: float | None) -> bool:
    """Whether the lower bound of the success rate is above a limit.

    Raises:
      ValueError: for a limit out of [0, 1).
    """
    if fail_above is None:
        return False
    if not 0 <= fail_above < 1:
        raise ValueError(f"fail_above must be at least 0 and below 1, got {fail_above!r}.")
    return results["headline"]["success"]["low"] > fail_above


def junit(results: Mapping[str, Any], fail_above: float | None) -> str:
    """One test case, the strongest attack at the largest radius; all balls are properties."""
    failed, found = exceeds(results, fail_above), results["headline"]
    seconds = sum(draw["seconds"] for cell in results["cells"] for draw in cell["draws"])
    counts = {
        "tests": "1",
        "failures": str(int(failed)),
        "errors": str(int(bool(results["failures"]))),
        "skipped": "0",
        "time": f"{seconds:.1f}",
    }
    suite = ElementTree.Element("testsuite", name="lft-audit", **counts)
    properties = ElementTree.SubElement(suite, "properties")
    for threat in results["threats"]:
        name = f"success {threat['norm']} {threat['radius']}"
        value = "{rate:.4f} [{low:.4f}, {high:.4f}]".format(**threat["success"])
        ElementTree.SubElement(properties, "property", name=name, value=value)
    case = ElementTree.SubElement(
        suite,
        "testcase",
        classname="lft_jax.audit",
        name=f"universal perturbation, {found['norm']} {found['radius']}",
        time=f"{seconds:.1f}",
    )
    if failed:
        message = f"success {_words.interval(found['success'])}: the lower bound is above {fail_above:g}"
        ElementTree.SubElement(case, "failure", message=message).text = "\n".join(results["verdict"]["sentences"])
    if results["failures"]:
        lost = [f"{failure['run']}: {failure['error']}" for failure in results["failures"]]
        ElementTree.SubElement(case, "error", message=f"{len(lost)} attacks failed").text = "\n".join(lost)
    ElementTree.SubElement(case, "system-out").text = "\n".join(
        [results["verdict"]["title"], *results["verdict"]["sentences"]]
    )
    ElementTree.indent(suite)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ElementTree.tostring(suite, encoding="unicode")}\n'
