"""Fuzzes everything that reads files, answers and flags: `make fuzz`.

Inputs are read in a child process, which is replaced if it ends. The counts go into a JSON file; the exit code is 1 if
an outcome is none of those that the docstrings name.
"""

import argparse
import collections
import json
import queue
import subprocess
import sys
import threading
import time

SILENT = 120  # seconds without a word after which the child process is replaced


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the numbers of inputs")
    parser.add_argument("--targets", default="", help="names, separated by commas; all if empty")
    parser.add_argument("--output", default="", help="JSON file for the counts; none if empty")
    parser.add_argument("--child", type=int, default=-1, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    from tests.fuzz import harness

    names = given.targets.split(",") if given.targets else list(harness.TARGETS)
    tasks = [(n, i) for n in names for i in range(max(1, round(given.scale * harness.TARGETS[n].inputs)))]
    if given.child >= 0:
        _child(harness, tasks[given.child :], given.seed)
        return 0
    began, counts, findings = time.perf_counter(), {n: collections.Counter() for n in names}, {}
    done = 0
    while done < len(tasks):
        for outcome, said in _answers(given, done):
            name, number = tasks[done]
            done += 1
            counts[name][outcome] += 1
            if outcome not in harness.FINE:
                seen = findings.setdefault(f"{name}: {outcome}: {said}", [])
                seen.append(number)
                if len(seen) == 1:
                    print(f"{name} {number}: {outcome}: {said}", flush=True)
            if done % 1000 == 0:
                print(f"{done} of {len(tasks)} inputs", flush=True)
    _report(harness, given, counts, findings, time.perf_counter() - began)
    return 1 if findings else 0


def _child(harness, tasks, seed):
    """Says `"start"` once, then the outcome of each task, one JSON value a line."""
    out, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps("start"), file=out, flush=True)
    harness.warm_up({name for name, _ in tasks})
    for name, number in tasks:
        print(json.dumps(harness.one(name, number, seed)), file=out, flush=True)


def _answers(given, first):
    """The outcomes of the tasks from `first` on, until the child process ends, whose last outcome is then a crash."""
    command = [sys.executable, "-m", "tests.fuzz", f"--child={first}", f"--seed={given.seed}", f"--scale={given.scale}"]
    command += [f"--targets={given.targets}"]
    lines = queue.Queue()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:

        def read():
            for line in child.stdout:
                lines.put(json.loads(line))
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        started = False
        while True:
            try:
                found = lines.get(timeout=SILENT)
            except queue.Empty:
                child.kill()
                yield "hang", f"nothing for {SILENT} s"
                return
            if found is None:
                break
            if found == "start":
                started = True
            else:
                yield found
    if not started:
        raise SystemExit(f"the child process did not start: {' '.join(command)}")
    if child.returncode:
        yield "crash", f"the process ended with {child.returncode}"


def _report(harness, given, counts, findings, seconds):
    width = max(map(len, counts))
    print(" " * width, *(f"{outcome:>12}" for outcome in harness.OUTCOMES))
    for name, found in counts.items():
        print(f"{name:{width}}", *(f"{found[outcome]:12d}" for outcome in harness.OUTCOMES))
    total = sum(sum(found.values()) for found in counts.values())
    print(f"{total} inputs in {seconds:.0f} s, {len(findings)} findings")
    if given.output:
        from lft_jax.cli import provenance

        content = {
            "inputs": total,
            "seconds": round(seconds, 1),
            "targets": {name: {o: found[o] for o in harness.OUTCOMES} for name, found in counts.items()},
            "findings": [{"what": what, "inputs": n[:10], "count": len(n)} for what, n in findings.items()],
            "provenance": provenance.describe([given.seed]),
        }
        provenance.write_json(given.output, content)


if __name__ == "__main__":
    sys.exit(main())
