"""Run examples/quickstart.ipynb from top to bottom, and keep what its cells print.

    python tools/run_notebook.py        # `make docs` runs it; a minute on one core

Only what is printed is kept: no pictures, no paths, no warnings. It runs in this process, so it needs no kernel.
"""

import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


def run(notebook: dict[str, Any]) -> dict[str, Any]:
    """Run the cells in the folder at hand, and put what each printed below it; give what they defined."""
    space: dict[str, Any] = {}
    number = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        number += 1
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), space)
        lines = printed.getvalue().splitlines(keepends=True)
        cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
        cell["execution_count"] = number
    return space


def main() -> None:
    """Run the notebook, and write it back."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        run(notebook)
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
