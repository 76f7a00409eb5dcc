"""The API reference and the quick-start notebook: complete, not stale, and every line of them runs."""

import importlib.util
import json
import warnings
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

import remos_hf

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:.*never covered.*:UserWarning", "ignore::FutureWarning")


def load_tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tool():
    return load_tool("api_reference")


def test_the_reference_is_what_make_docs_would_write(tool):
    assert tool.REFERENCE.read_text(encoding="utf-8") == tool.reference(), "make docs"


def test_every_public_name_has_a_line_a_link_and_an_example(tool):
    text = tool.REFERENCE.read_text(encoding="utf-8")
    for name in remos_hf.__all__:
        (entry,) = [part for part in text.split("\n### ")[1:] if part.partition("\n")[0] == name]
        assert f"(#{name.lower()})" in text
        line, example = entry.split("```python\n")
        assert len(line.split()) > 4
        assert name in example


@pytest.mark.parametrize("change", ["no example", "no name", "twice", "another line"])
def test_a_name_without_an_example_and_a_stale_reference_are_noticed(tool, tmp_path, monkeypatch, change):
    text = tool.EXAMPLES.read_text(encoding="utf-8")
    changed = {
        "no example": text.replace("# %% Retrain\n", "# %% Finetune2\n"),
        "no name": text.replace("Retrain(seed=0)", "None").replace("import Retrain", "import Finetune"),
        "twice": text + "\n# %% Retrain\nRetrain()\n",
        "another line": text.replace("Retrain(seed=0)", "Retrain(seed=1)"),
    }[change]
    path = tmp_path / "api_examples.py"
    path.write_text(changed)
    monkeypatch.setattr(tool.examples, "__defaults__", (path,))
    if change == "another line":
        assert tool.reference() != tool.REFERENCE.read_text(encoding="utf-8")
    else:
        with pytest.raises(ValueError, match="Retrain|Finetune2"):
            tool.reference()


@pytest.mark.timm
def test_every_example_of_the_reference_runs(tool, tmp_path, monkeypatch, capsys):
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    space = {}
    done = set()
    for name, code in tool.examples().items():
        if code not in done:
            exec(compile(code, f"the example of {name}", "exec"), space)
        done.add(code)


def test_the_notebook_runs_from_top_to_bottom_and_ends_in_a_page(tmp_path, monkeypatch, capsys):
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    settings = "TEACHER_STEPS, STUDENT_STEPS, SEEDS, SIZES = 120, 60, (0, 1, 2), (480, 240, 300)\n"
    (place,) = [
        (cell, row) for cell in notebook["cells"] for row, line in enumerate(cell["source"]) if line == settings
    ]
    place[0]["source"][place[1]] = settings.replace("120, 60, (0, 1, 2), (480, 240, 300)", "3, 2, (0, 1), (32, 24, 40)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "filters", [*warnings.filters])
    threads = torch.get_num_threads()
    try:
        space = load_tool("run_notebook").run(notebook)
    finally:
        torch.set_num_threads(threads)
        logging.enable_progress_bar()
    assert (tmp_path / "quickstart.html").stat().st_size > 10_000
    report = space["report"]
    assert {one["seed"] for one in report.records} == {0, 1}
    assert {one["student"] for one in report.records} == {"finetune", "random 0.5", "remos 0.5"}
    printed = [line for cell in notebook["cells"] for one in cell.get("outputs", ()) for line in one["text"]]
    assert sum(line.startswith("remos 0.5 seed") for line in printed) == 2


def test_the_notebook_is_small_and_holds_no_path_of_the_machine_it_ran_on():
    text = (ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert notebook["nbformat"] == 4 and len(text) < 60_000
    assert all(cell.get("id") and "metadata" in cell for cell in notebook["cells"])
    assert str(Path.home()) not in text and "/tmp/" not in text
