"""The notebooks: their sources run in a short form; the committed ones have the code of their sources, and outputs."""

import json
import re
from pathlib import Path

import jax
import pytest

SOURCES = sorted((Path(__file__).parents[2] / "docs" / "notebooks").glob("*.py"))


@pytest.mark.frameworks  # PyTorch; and all of them take a minute
@pytest.mark.standard_promotion
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_runs(path, monkeypatch, tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    monkeypatch.setenv("LFT_SHORT", "1")
    monkeypatch.chdir(tmp_path)
    with jax.numpy_rank_promotion("allow"):
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), {"__name__": "notebook"})
    assert plt.get_fignums()
    plt.close("all")


def code(cells):
    return ["".join(cell["source"]).strip() for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_committed_notebook_is_its_source_with_outputs(path):
    file = path.with_suffix(".ipynb")
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    parts = re.split(r"^# %%", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    assert code(cells) == [part.strip() for part in parts if not part.startswith(" [markdown]")]
    outputs = [output for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert file.stat().st_size < 600_000
