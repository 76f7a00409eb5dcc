import importlib.util
import json
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(f"{name}_example", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_smoke_prunes_by_every_method_and_writes_both_files(tmp_path, capsys):
    pruning = example("prune_classes")
    before = torch.get_rng_state()
    pruning.main(pruning.parse_args(["--smoke", "--output_dir", str(tmp_path)]))
    assert torch.equal(torch.get_rng_state(), before)
    report = json.loads((tmp_path / "prune_classes.json").read_text())
    found = {(cell["method"], cell["removed"]): cell for cell in report["cells"]}
    assert set(found) == {(method, removed) for method in pruning.METHODS for removed in (0.5, 0.9)}
    assert all(0 <= cell[rate] <= 1 for cell in found.values() for rate in ("before", "after", "others"))
    assert found["contributions", 0.5]["before"] > found["random", 0.9]["before"]
    assert (tmp_path / "prune_classes.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(method in printed for method in pruning.METHODS)


@pytest.mark.parametrize("name", ["prune_classes", "protect_classes"])
def test_they_import_from_the_front_door_alone(name):
    assert "from remos_hf." not in (EXAMPLES / f"{name}.py").read_text()
