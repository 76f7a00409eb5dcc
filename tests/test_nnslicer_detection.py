import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from remos_hf.applications.input_features import Observed
from remos_hf.whole import replace_file

pytest.importorskip("art")
ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.timm


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("nnslicer_detection", ROOT / "benchmarks" / "nnslicer_detection.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def tiny(benchmark, tmp_path, monkeypatch):
    """A net that was never trained, and images under the labels that it gives them."""
    example = sys.modules["audit_image_defects"]
    torch.manual_seed(0)
    net = example.CifarResNet(1).eval()
    torch.save({"state_dict": net.state_dict()}, tmp_path / "net.th")
    random = np.random.default_rng(0)
    for part, count in (("train", 70), ("test", 50)):
        for number in range(count):
            bright = random.integers(0, 200, 3)
            pixels = (bright + random.integers(0, 56, (32, 32, 3))).astype(np.uint8)
            images = example.ImageInput((32, 32), crop_share=1.0)
            label = int(net(images.normalised(torch.tensor(pixels).permute(2, 0, 1)[None] / 255)).argmax())
            wrong = number % 10 if number < 20 else label
            folder = tmp_path / part / f"class{wrong}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    monkeypatch.setattr(benchmark, "SMOKE", benchmark.Sizes(70, 50, 20, 6, 6, 4, (0,), (16, 1), 50, 40))
    monkeypatch.setattr(benchmark, "TRIGGERS", ("patch",))
    monkeypatch.setattr(benchmark, "ATTACKS", ("fgsm_8", "blur"))
    given = ["--cifar", tmp_path, "--cifar_resnet", tmp_path / "net.th", "--work_dir", tmp_path / "work", "--smoke"]
    monkeypatch.setattr(sys, "argv", ["nnslicer_detection.py", *map(str, given), "--output", str(tmp_path / "out")])
    return tmp_path


def test_it_measures_tells_and_goes_on_where_it_was(benchmark, tiny, monkeypatch):
    benchmark.main()
    told = json.loads((tiny / "out" / "nnslicer_detection.json").read_text())
    text = (tiny / "out" / "nnslicer_detection.md").read_text()
    assert set(told["adversarial"]) == set(benchmark.NAMES) and set(told["triggers"]) == {"patch"}
    assert "**The published claim " in text and "adef" in text and (tiny / "out" / "nnslicer_detection.png").is_file()
    lost = tiny / "work" / "scores_slice_class_0.json"
    before = lost.read_text()
    lost.unlink()
    monkeypatch.setattr(benchmark, "attack_images", None)  # what is done is not done again
    benchmark.main()
    assert lost.read_text() == before
    assert json.loads((tiny / "out" / "nnslicer_detection.json").read_text()) == told


def seen_sets(attacked_by, count=60):
    """Features: the label that they speak for, the attack that left a trace, noise."""
    random = np.random.default_rng(0)

    def seen(labels, told, trace=0):
        noise = random.integers(0, 9, len(labels))
        return Observed(np.stack([told, np.full(len(labels), trace), noise], 1).astype(np.int8), labels)

    labels = np.arange(count) % 4
    rows = {name: np.arange(count) for name in attacked_by}
    sets = {
        "shown": seen(labels, labels * 5),
        "clean": seen(labels, labels * 5),
        "wrong": seen(labels, (labels + 2) % 4 * 5),
    }
    for name, trace in attacked_by.items():
        sets[f"attacked {name}"] = seen((labels + 1) % 4, labels * 5, trace)
        sets[f"noise {name}"] = seen(labels, labels * 5)
    return sets, rows


def test_trees_that_see_no_attack_flag_what_speaks_for_another_label_and_so_errors_too(benchmark):
    found = benchmark.scores_of(*seen_sets({"fgsm_2": 3, "blur": 7}), seed=0)["none_shown"]
    assert set(found["attacks"]["blur"]["attacked"]) == {1.0} and set(found["clean"]) == {0.0}
    assert set(found["wrong"]) == {1.0} and set(found["noise"]) == {0.0}


def test_an_attack_is_left_out_with_its_family_and_only_the_other_half_is_scored(benchmark):
    found = benchmark.scores_of(*seen_sets({"fgsm_2": 3, "fgsm_4": 3, "pgd_2": -3, "blur": -3}), seed=0)
    known, unknown = found["shown"]["attacks"], found["others_shown"]["attacks"]
    assert set(known["fgsm_4"]["attacked"]) == {1.0} == set(known["blur"]["attacked"])
    assert set(unknown["fgsm_2"]["attacked"]) == {0.0}  # fgsm_4 has its trace, but was not shown either
    assert set(unknown["blur"]["attacked"]) == {1.0}  # pgd_2 has its trace
    assert all(len(of["attacked"]) == len(of["clean"]) == 30 for of in known.values())


def told_of(recall, clean, wrong, precision, aurocs):
    def rate(value):
        return {"value": value, "low": value - 0.01, "high": value + 0.01}

    own, *rivals = (
        {
            "recall": rate(recall),
            "mean": {"precision": rate(precision), "auroc": rate(auroc)},
            "controls": {"clean": rate(clean), "wrong": rate(wrong)},
        }
        for auroc in aurocs
    )
    names = ("effective_path", "feature_map")
    return {
        "slice_class": {"none_shown": own},
        **{name: {"none_shown": one} for name, one in zip(names, rivals, strict=True)},
    }


@pytest.mark.parametrize(
    ("numbers", "fails"),
    [
        ((0.998, 0.05, 0.06, 0.95, (0.95, 0.8, 0.7)), None),
        ((0.9, 0.05, 0.06, 0.95, (0.95, 0.8, 0.7)), "recall is perfect"),
        ((0.998, 0.05, 0.99, 0.95, (0.95, 0.8, 0.7)), "more often"),
        ((0.998, 0.05, 0.06, 0.5, (0.95, 0.8, 0.7)), "precision is high"),
        ((0.998, 0.05, 0.06, 0.95, (0.95, 0.8, 0.945)), "it beats"),
    ],
)
def test_the_claim_is_called_true_where_all_of_it_is(benchmark, numbers, fails):
    said = sys.modules["nnslicer_detection_told"]._verdict(told_of(*numbers))
    assert ("does not hold" in said) == (fails is not None)
    assert fails is None or fails in said.partition("What holds")[0]


def test_an_unfinished_step_leaves_no_file(benchmark, tmp_path):
    def fails():
        raise KeyboardInterrupt

    for once in (benchmark.once, benchmark.arrays_once):
        with pytest.raises(KeyboardInterrupt):
            once(tmp_path / "step.npz", fails)
    assert not list(tmp_path.iterdir())
    replace_file(tmp_path / "done.json", b"[1]")
    assert benchmark.once(tmp_path / "done.json", fails) == [1]
