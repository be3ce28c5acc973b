r"""Renders results files as Markdown: one page per file, and the tables of docs/results.md and README.md.

python -m experiments.report.render                 # every page and every figure
python -m experiments.report.render --nodraw        # every page, figures as they are
python -m experiments.report.render --document=README.md --summary
python -m experiments.report.render --results=runs/mine.json --document=notes.md

Without `--document` the documents are

- `docs/results/NAME.md`, one page per results file, generated completely;
- `docs/results/all-victims.md`, all comparisons side by side, generated completely;
- `docs/results.md`: a summary and links to the pages, between its `<!-- results -->` marks;
- `README.md`: the shipped rule on the public models, between its marks;
- `docs/victims.md`: the table of the stored victims, between its marks;
- `docs/defence.md`: the tables of the study of defences, between its marks;
- `docs/reliability.md`: what `make trust` measured, between its marks.

With `--document` only that file changes, between its marks. It gets the sections of `--results`, or their summary. The
text depends only on the results files and on the cards of the victims.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import config
from experiments.report import (
    defence,
    figures,
    objectives,
    omniglot,
    public,
    queries,
    reliability,
    sections,
    starts,
    tables,
    tile,
    victims,
)


def _draw_comparison(results, path):
    figures.asr_against_step(results["rows"], path)
    figures.steps_to_reach(results["rows"], path.with_name(f"{path.stem}_steps.png"))


def _draw_nothing(results, path):
    del results, path


#: `{program: (section, figure)}`, by the program that wrote a results file.
KINDS = {
    "sine": (sections.sine_section, lambda results, path: figures.sine(results["rows"], path)),
    "zo_l2l": (sections.zo_l2l_section, figures.zo_l2l),
    "classification": (
        sections.classification_section,
        lambda results, path: figures.classification(results["rows"], path),
    ),
    "omniglot": (omniglot.omniglot_section, omniglot.draw),
    "theory_gap": (sections.theory_section, figures.theory_gap),
    "breadth": (sections.breadth_section, _draw_nothing),
    "public": (public.public_section, figures.public),
    "public_queries": (queries.queries_section, queries.draw_queries),
    "objectives": (objectives.objectives_section, _draw_nothing),
    "starts": (starts.starts_section, _draw_nothing),
    "tile": (tile.tile_section, _draw_nothing),
    "defence": (defence.defence_section, _draw_nothing),
    "ablation": (sections.ablation_section, _draw_nothing),
    "directions": (sections.directions_section, _draw_nothing),
    "train_victim": (sections.victim_section, _draw_nothing),
    "timings": (sections.timings_section, _draw_nothing),
}
COMPARISON = (tables.results_section, _draw_comparison)
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
RESULTS, PAGES, SUMMARY, README = "results", "docs/results", "docs/results.md", "README.md"
VICTIMS, DEFENCE, RELIABILITY = "docs/victims.md", "docs/defence.md", "docs/reliability.md"
OVERVIEW = "all-victims"
#: Prefix of files that `benchmarks.render` renders, into docs/performance.md.
BENCHMARKS = "bench_"
#: What `make trust` merges into reliability.json, whose tables are part of docs/reliability.md.
TRUST = ("fuzz.", "chaos.", "properties.", "meta_gradients.", "soak.", "reliability.")
#: Groups of links in docs/results.md: title, prefixes of page names.
GROUPS = (
    ("One image per class, exact gradients, linf ball (the table above)", ("hard-",)),
    ("Five images per class", ("five_images-",)),
    ("A second loss, given up ([decision 011](decisions/011-second-loss.md))", ("two_losses-",)),
    ("A base update along the gradient, given up ([decision 012](decisions/012-base-update.md))", ("gradient_start-",)),
    ("Query-only attacks", ("query-", "directions")),
    ("l2 ball", ("l2",)),
    ("A penalty instead of a ball (the paper's tasks)", ("paper",)),
    ("Other image sizes, radii, classes and steps", ("breadth",)),
    ("Public models, and victims attacked in the same way", ("public",)),
    ("Defences", ("defence",)),
    ("Ablations, on validation victims", ("ablation_",)),
    ("Gap between the meta-gradients of LFT and L2O", ("theory_gap",)),
    ("Problems other than universal attacks", ("sine", "classification", "omniglot", "zo_l2l")),
    ("The quickstart", ("quickstart",)),
    ("Training of victims, timings on a GPU", ("victim_", "gpu")),
    ("Others", ("",)),
)
#: Order of pages within a group, by the last part of their names.
ORDER = ("mnist", "mnist_vgg", "cifar10", "cifar10_vgg", "digits", "mnist_5k")
#: Comparisons that are left out of all-victims.md.
APART = ("quickstart",)
#: Models of the summary in the README: test models, on which nothing was chosen.
PUBLIC = (
    *("resnet32", "efficientnet_lite0", "cifar10_vgg_1001", "cifar10_small_cnn_1000", "mnist_vgg_1001"),
    *("mnist_small_cnn_1000", "digits_small_cnn_1000", "digits_lenet_1001"),
)
#: Results files of the summaries of comparisons, and victims of the brief one.
HEADLINE = tuple(f"hard/{name}.json" for name in ORDER[:5])
SHOWN = ("mnist_small_cnn_1000", "cifar10_small_cnn_1000", "cifar10_vgg_1001", "digits_small_cnn_1000")


@dataclasses.dataclass(frozen=True)
class Config:
    """Command-line flags."""

    results: tuple[str, ...] = config.option((), "Results files (.json); all files in results/ if empty.")
    document: str | None = config.option(
        None, "Markdown file to change, between its marks; all documents if not given."
    )
    summary: bool = config.option(
        False, "With --document: write a short table of the comparisons instead of their sections."
    )
    draw: bool = config.option(True, "Also draw the figures, beside the results files.")


def render(flags: Config) -> None:
    """Writes the documents that the flags name, and the figures beside the results files."""
    paths = flags.results or all_results(".")
    if flags.document is None and flags.results:
        raise ValueError("results: all results files are rendered without --document; set --document too.")
    found = {str(path): _read(path) for path in paths}
    if flags.document is None:
        documents = all_documents(".", found)
    elif flags.summary:
        documents = {flags.document: _between_marks(Path(flags.document), tables.brief(_headline(found), SHOWN))}
    else:
        documents = {flags.document: _between_marks(Path(flags.document), _sections(found, flags.document))}
    if flags.draw and not flags.summary:
        for path, results in found.items():
            _kind(results, path)[1](results, Path(path).with_suffix(".png"))
    if flags.document is None:
        for page in Path(PAGES).glob("*.md"):
            if str(page) not in documents:
                page.unlink()  # its results file was deleted
    for path, text in documents.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text, encoding="utf-8")


def all_results(root: str | os.PathLike[str]) -> list[str]:
    """Paths, relative to `root`, of the results files that have a page, in alphabetical order."""
    paths = sorted(Path(root, RESULTS).rglob("*.json"))
    return [path.relative_to(root).as_posix() for path in paths if not path.name.startswith((BENCHMARKS, *TRUST))]


def all_documents(root: str | os.PathLike[str], found: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """`{path: text}` of all documents, from `{path: results}`. Paths are relative to `root`."""
    pages = {page_name(path): (path, results) for path, results in found.items()}
    if len(pages) < len(found):
        raise ValueError(f"results: two files would have the same page; the pages are {sorted(pages)}.")
    documents, headings = {}, {}
    for name, (path, results) in pages.items():
        page = f"{PAGES}/{name}.md"
        section = _section(results, path, page)
        headings[name] = section.partition("\n")[0].removeprefix("## ")
        documents[page] = _page(section)
    compared = [pages[name] for name in _ordered(pages) if name not in APART]
    compared = [results for path, results in compared if _kind(results, path) is COMPARISON]
    documents[f"{PAGES}/{OVERVIEW}.md"] = _page(tables.claims(compared))
    headline = _headline(found)
    links = "\n".join(_links(pages, headings))
    documents[SUMMARY] = _between_marks(Path(root, SUMMARY), f"{tables.summary(headline)}\n{links}\n")
    shown = [found[path] for path in (f"{RESULTS}/public/{name}.json" for name in PUBLIC) if path in found]
    documents[README] = _between_marks(Path(root, README), public.public_brief(shown))
    documents[VICTIMS] = _between_marks(Path(root, VICTIMS), victims.victims_table(root))
    defended = [pages[name][1] for name in _ordered(pages) if name.startswith("defence-")]
    documents[DEFENCE] = _between_marks(Path(root, DEFENCE), defence.defence_summary(defended))
    trust = Path(root, RESULTS, "reliability.json")
    if trust.is_file():
        section = reliability.reliability_section(_read(trust), trust.relative_to(root).as_posix())
        documents[RELIABILITY] = _between_marks(Path(root, RELIABILITY), section)
    return documents


def page_name(path: str) -> str:
    """Page name of a results file: "hard-mnist" for results/hard/mnist.json, "l2" for results/l2/results.json."""
    parts = Path(path).with_suffix("").parts
    parts = parts[parts.index(RESULTS) + 1 :] if RESULTS in parts[:-1] else parts[-1:]
    return "-".join(parts[:-1] if parts[-1] == "results" and len(parts) > 1 else parts)


def _headline(found):
    headline = [found[path] for path in (f"{RESULTS}/{name}" for name in HEADLINE) if path in found]
    return headline or [results for path, results in found.items() if _kind(results, path) is COMPARISON]


def _sections(found: Mapping[str, Mapping[str, Any]], document: str) -> str:
    compared = [results for path, results in found.items() if _kind(results, path) is COMPARISON]
    parts = [tables.claims(compared), *(_section(results, path, document) for path, results in found.items())]
    return "\n".join(filter(None, parts))


def _section(results, path, document):
    beside = Path(os.path.relpath(Path(path).with_suffix(""), Path(document).parent)).as_posix()
    return _kind(results, path)[0](results, path, beside)


def _page(section):
    text = section.replace("## ", "# ", 1).strip()
    return (
        f"<!-- Generated by `python -m experiments.report.render`; do not edit. -->\n{text}\n\n"
        "[All results](../results.md) | [how they are measured](../protocol.md)\n"
    )


def _links(pages: Sequence[str], headings: Mapping[str, str]) -> list[str]:
    left, lines = list(_ordered(pages)), [f"- [Every comparison side by side]({Path(PAGES).name}/{OVERVIEW}.md)"]
    for title, prefixes in GROUPS:
        names = [name for name in left if name.startswith(prefixes)]
        left = [name for name in left if name not in names]
        group = prefixes[0].rstrip("-_")
        links = ", ".join(
            f"[{name.removeprefix(group).lstrip('-_') or name}]({Path(PAGES).name}/{name}.md)" for name in names
        )
        lines += [f"- {title}: {links}"] if names else []
    return lines


def _ordered(names):
    def place(name):
        group = next(number for number, (_, prefixes) in enumerate(GROUPS) if name.startswith(prefixes))
        tail = name.partition("-")[2]
        return group, ORDER.index(tail) if tail in ORDER else len(ORDER), name

    return sorted(names, key=place)


def _between_marks(document, text):
    old = document.read_text(encoding="utf-8")
    if BEGIN not in old or END not in old:
        raise ValueError(f"document: {document} has no marks {BEGIN} and {END}.")
    return f"{old.partition(BEGIN)[0]}{BEGIN}\n{text}{END}{old.partition(END)[2]}"


def _read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def _kind(results, path):
    """Section and figure of a results file, by the program that wrote it or else by its keys."""
    command = results.get("provenance", results).get("command", "")
    module = command.split()[2].rpartition(".")[2] if command else ""  # its package may have changed since
    if module in KINDS:
        return KINDS[module]
    if {"tasks", "protocol", "rows"} <= results.keys():
        return COMPARISON
    if {"meta_training", "attacks"} <= results.keys():
        return KINDS["timings"]
    raise ValueError(f"results: {path} was written by {module or 'an unknown program'}, which has no section in KINDS.")


if __name__ == "__main__":
    config.main(Config, render)
