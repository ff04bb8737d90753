"""The notebook runs from top to bottom."""

import re
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "smart_batching.ipynb"


def printed(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)


def assert_text_has_the_printed_figures(notebook: nbformat.NotebookNode) -> None:
    text = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    figures = set(re.findall(r"\d{1,3}(?:,\d{3})+|\d+\.\d+", text))
    assert len(figures) >= 8
    assert figures - set(re.findall(r"\d[\d,.]*\d", printed(notebook))) == set()


def test_the_figures_in_the_notebooks_text_are_those_that_it_prints() -> None:
    assert_text_has_the_printed_figures(nbformat.read(NOTEBOOK, as_version=4))


@pytest.mark.slow
def test_the_notebook_runs_in_two_minutes_and_shows_figures_and_savings(own_cache: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    start = time.perf_counter()
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert time.perf_counter() - start <= 120
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert_text_has_the_printed_figures(notebook)
    for name in ("fixed", "smart", "packed"):
        assert re.search(rf"{name} .*% less .* times as fast", printed(notebook))
    assert "positive (" in printed(notebook) or "negative (" in printed(notebook)
