"""Runs the notebooks of the documentation and writes them with their outputs, beside their sources.

python .ci/notebooks.py docs/notebooks/*.py
"""

import sys
from pathlib import Path

import jupytext
import nbclient
import nbformat


def execute(path: Path) -> None:
    notebook = jupytext.read(path)
    nbclient.NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
    notebook.metadata.get("language_info", {}).pop("version", None)
    nbformat.write(notebook, path.with_suffix(".ipynb"))
    print(f"{path}: {path.with_suffix('.ipynb').stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        execute(Path(name))
