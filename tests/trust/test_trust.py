"""`make trust`: parts that are missing or failed are shown, and those of the present code are kept."""

import importlib.util
import json
from pathlib import Path

import pytest

from tests.trust import __main__ as trust

ORIGIN = {"command": "python -m x", "commit": "0123456789ab", "device": "1 x cpu, 2 cores", "date": "2026-01-02"}
COUNTS = {"findings": [], "failures": 0, "inputs": 3, "series": [1, 2]}


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Parts that write what `ran.writes` has, or nothing; `ran.names` are those that ran."""

    class Ran:
        names, writes, codes = [], {}, {}
        output = tmp_path / "reliability.json"

        def main(self, *flags):
            self.names.clear()
            code = trust.main([f"--output={self.output}", *flags])
            return code, json.loads(self.output.read_text())

    ran = Ran()
    ran.writes = {part.module: {**COUNTS, "provenance": ORIGIN} for part in trust.PARTS.values()}

    def run(module, path):
        ran.names.append(module)
        if ran.writes[module] is not None:
            path.write_text(json.dumps(ran.writes[module]))
        return ran.codes.get(module, 0)

    monkeypatch.setattr(trust, "run", run)
    monkeypatch.setattr(trust, "_is_present", lambda found: found is not None)
    return ran


def test_all_parts_run_and_are_merged(ran):
    code, found = ran.main()
    assert code == 0 and found["passed"] and ran.names == [part.module for part in trust.PARTS.values()]
    assert found["parts"]["fuzz"] == {"state": "passed", "exit_code": 0, **ORIGIN, "results": COUNTS}
    assert "series" not in found["parts"]["soak"]["results"]  # it is long
    assert "commit" in found["provenance"]


def test_parts_of_the_present_code_are_kept_unless_again(ran):
    ran.main()
    code, found = ran.main()
    assert code == 0 and not ran.names and found["parts"]["soak"]["state"] == "passed"
    ran.main("--again")
    assert len(ran.names) == len(trust.PARTS)


@pytest.mark.parametrize(
    ("written", "code", "state"),
    [
        (None, 1, "failed"),  # it crashed
        ({**COUNTS, "findings": ["x"]}, 1, "failed"),
        (COUNTS, 1, "failed"),
        (COUNTS, 0, "passed"),
    ],
)
def test_a_part_that_failed_is_shown(ran, written, code, state):
    ran.main()
    ran.writes["tests.fuzz"], ran.codes["tests.fuzz"] = written and {**written, "provenance": ORIGIN}, code
    total, found = ran.main("--again")
    assert found["parts"]["fuzz"]["state"] == state
    assert total == (state != "passed") and found["passed"] == (state == "passed")


def test_a_table_under_way_has_not_passed(ran):
    ran.writes["tests.trust.gradients"] = {**COUNTS, "complete": False, "provenance": ORIGIN}
    code, found = ran.main()
    assert code == 1 and found["parts"]["gradients"]["state"] == "failed"
    ran.writes["tests.trust.gradients"]["complete"] = True
    assert ran.main("--again")[0] == 0


def test_a_kept_part_with_findings_has_failed(ran):
    ran.writes["tests.trust.gradients"] = {**COUNTS, "failures": 2, "provenance": ORIGIN}
    ran.main()
    code, found = ran.main()
    assert code == 1 and not ran.names and found["parts"]["gradients"]["state"] == "failed"


def test_merging_alone_runs_nothing_and_shows_what_is_missing(ran):
    code, found = ran.main("--merge_only")
    assert code == 1 and not ran.names and not found["passed"]
    assert {part["state"] for part in found["parts"].values()} == {"missing"}


def test_parts_exist():
    for part in trust.PARTS.values():
        assert importlib.util.find_spec(part.module) is not None


def test_files_of_other_code_are_not_kept(monkeypatch):
    def found(commit):
        return {"provenance": {"commit": commit}}

    monkeypatch.setattr(trust.provenance, "describe", lambda seeds: found("0123456789ab")["provenance"])
    assert not trust._is_present(None) and not trust._is_present(found("lft_jax 1.0"))
    assert not trust._is_present(found("0123456789ab + uncommitted changes"))
    assert not trust._is_present(found("0123456789ab"))  # no such commit
    head = Path(trust.__file__).parent
    commit = trust.subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=head, capture_output=True, text=True)
    if commit.returncode == 0:
        assert trust._is_present(found(commit.stdout.strip()))
    monkeypatch.setattr(trust.provenance, "describe", lambda seeds: found("ab + uncommitted changes")["provenance"])
    assert not trust._is_present(found(commit.stdout.strip()))
