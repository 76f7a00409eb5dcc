"""A short run of benchmarks/cartl.py: what it shares between runs, and what its table says."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from remos_hf.evaluation.measures import Rate

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "cartl.py"
_SPEC = importlib.util.spec_from_file_location("cartl", SCRIPT)
cartl = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(cartl)


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """Noise in ten classes."""
    folder, generator = tmp_path_factory.mktemp("cifar"), torch.Generator().manual_seed(0)
    for part, count in (("train", 9), ("test", 3)):
        for label in range(10):
            place = folder / part / f"class{label}"
            place.mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(0, 256, (32, 32, 3), generator=generator).byte().numpy()
                Image.fromarray(pixels).save(place / f"{number}.png")
    return folder


def run(cifar, work, *options):
    asked = ["--cifar", cifar, "--work_dir", work, "--depth", 10, "--smoke", *options]
    cartl.main([str(one) for one in asked])


def test_runs_of_one_work_folder_share_teachers_of_the_same_making_alone(cifar, tmp_path, monkeypatch):
    work = tmp_path / "work"
    run(cifar, work, "--output", tmp_path / "one")
    first = {path.name: path.read_bytes() for path in work.glob("teacher-*")}
    assert len(first) == 2  # AT, and FDM with k=3
    rows = json.loads((tmp_path / "one.json").read_text())["rows"]
    assert [row["model"] for row in rows.values()] == [
        "AT (teacher)", "AT+TL", "AT+NEFT", "AT+FDM (teacher)", "AT+FDM+NEFT",
    ]  # fmt: skip
    run(cifar, work, "--output", tmp_path / "other", "--attack_steps", 3, "--width", 2)
    assert len(list(work.glob("teacher-*"))) == 4
    assert {name: (work / name).read_bytes() for name in first} == first

    begun = []
    monkeypatch.setattr(cartl, "trained", lambda *args: begun.append(args[2]) or {"start": {}})
    run(cifar, work, "--output", tmp_path / "one")
    assert not begun
    run(cifar, work, "--output", tmp_path / "students", "--beta", 0.6)
    assert [type(one).__name__ for one in begun] == ["Neft"] * 3
    again = json.loads((tmp_path / "students.json").read_text())["rows"]
    assert again["teacher-at-seed-0"] == rows["teacher-at-seed-0"]
    with pytest.raises(SystemExit, match="other settings"):
        run(cifar, work, "--output", tmp_path / "one", "--beta", 0.6)


def test_the_table_says_where_a_norm_cancels_beta(cifar, tmp_path):
    work = tmp_path / "work"
    run(cifar, work)
    table = (work / "smoke.md").read_text()
    assert table.startswith("# CARTL on WRN-10-1") and "| 0 of 4 layers |" in table
    assert "k=3: no norm cancels beta." in table and "cannot be said below 3 seeds" in table
    run(cifar, work, "--submodel_statistics", "update", "--output", tmp_path / "updated")
    table = (tmp_path / "updated.md").read_text()
    assert "| 1 of 4 layers |" in table
    assert "k=3: beta does nothing in body.layer3.0.conv1: the norm right behind takes" in table


def test_a_wide_resnet_has_the_published_channels_and_only_depths_that_exist():
    net = cartl.WideResNet(16, 2, seed=0)
    assert [len(stage) for stage in (net.layer1, net.layer2, net.layer3)] == [2, 2, 2] and net.linear.in_features == 128
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert torch.equal(net.conv1.weight, cartl.WideResNet(16, 2, seed=0).conv1.weight)
    with pytest.raises(SystemExit, match="but got 12"):
        cartl.WideResNet(12, 1, seed=0)


def rows_of(k=4, seeds=3, **counts):
    names = dict(zip(("TL", "NEFT", "FDM"), cartl.ORDER, strict=True))
    return [
        {"model": names[name], "k": k, "seed": seed, "pgd": {"robust_acc": Rate.of(count + seed, 400).to_dict()}}
        for name, count in counts.items()
        for seed in range(seeds)
    ]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (rows_of(TL=40, NEFT=120, FDM=240), "The slides' order holds."),
        (rows_of(TL=120, NEFT=40, FDM=240), "does not hold: AT+NEFT is below AT+TL."),
        (rows_of(TL=120, NEFT=124, FDM=240), "cannot be said: the intervals of AT+TL and AT+NEFT overlap."),
        (rows_of(TL=40, NEFT=120, FDM=122), "cannot be said: the intervals of AT+NEFT and AT+FDM+NEFT overlap."),
        (rows_of(TL=40, NEFT=120, FDM=240, seeds=2), "cannot be said below 3 seeds."),
    ],
)
def test_whether_the_slides_order_holds_is_said_by_intervals_over_seeds(rows, said):
    (told,) = cartl.order_told(rows)
    assert told.startswith("- k=4, PGD: AT+TL ") and told.endswith(said)


def test_each_k_is_told_of_and_one_that_is_not_whole_is_not():
    whole, half = rows_of(TL=40, NEFT=120, FDM=240), rows_of(k=6, TL=40, NEFT=120)
    assert len(cartl.order_told([*whole, *half])) == 1
    assert len(cartl.order_told([*whole, *rows_of(k=6, TL=40, NEFT=120, FDM=240)])) == 2
