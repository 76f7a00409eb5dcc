import importlib.util
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "quickstart.py"


@pytest.fixture(scope="module")
def quickstart():
    spec = importlib.util.spec_from_file_location("quickstart_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_smoke_measures_every_strategy_and_writes_both_files(quickstart, tmp_path, capsys):
    before = torch.get_rng_state()
    quickstart.main(quickstart.parse_args(["--smoke", "--output_dir", str(tmp_path)]))
    assert torch.equal(torch.get_rng_state(), before)
    result = json.loads((tmp_path / "quickstart.json").read_text())
    assert set(result["strategies"]) == set(quickstart.STRATEGIES)
    for measured in (result["teacher"], *result["strategies"].values()):
        assert [seed["seed"] for seed in measured["by_seed"]] == result["seeds"] == [0]
        for seed in measured["by_seed"]:
            assert all(0 <= seed[rate] <= 1 for rate in ("acc", "dir", "floor", "floor_acc"))
            assert min(seed["num_samples"], seed["num_right"], seed["floor_num_right"]) > 0
            assert math.isclose(seed["excess_dir"], seed["dir"] - seed["floor"])
    assert (tmp_path / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(label in printed for label in quickstart.LABELS.values())


def test_every_reset_keeps_the_same_share_and_the_teacher_stays_as_it_was(quickstart):
    setting = quickstart.Setting(slice_ratio=0.7)
    teacher = quickstart.fresh_net(0, "teacher weights")
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    student_data = quickstart.split_digits(setting, 0)["student"]
    for rule in quickstart.RESET_RULES:
        student, facts = quickstart.start_student(rule, teacher, student_data, setting, 0)
        kept = sum(share * facts["num_weights"][name] for name, share in facts["share_kept"].items())
        assert kept == pytest.approx(0.7 * sum(facts["num_weights"].values()), abs=1)
        assert 0 < facts["squares_reset"] < 1
        assert not torch.equal(student.head.weight, teacher.head.weight)
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.state_dict().items())


def test_trigger_touches_only_the_patch(quickstart):
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    exposed = quickstart.add_trigger(images, 2)
    assert torch.equal(images, before)
    assert (exposed[..., :2, :2] == 1).all()
    outside = torch.ones(8, 8, dtype=torch.bool)
    outside[:2, :2] = False
    assert torch.equal(exposed[..., outside], images[..., outside])


def test_poison_marks_and_relabels_the_same_samples(quickstart):
    images, labels = torch.zeros(200, 1, 8, 8), torch.full((200,), 7)
    setting = quickstart.Setting(poison_rate=0.25, target_label=3)
    marked, relabelled = quickstart.poison((images, labels), setting, torch.Generator().manual_seed(0))
    poisoned = marked.flatten(1).sum(1) == 4
    assert torch.equal(relabelled == 3, poisoned) and torch.equal(relabelled == 7, ~poisoned)
    assert 30 <= poisoned.sum() <= 70  # 50 expected; sd 6


def test_parts_of_a_split_share_no_image(quickstart):
    numbered = torch.arange(1797.0)[:, None, None].expand(-1, 8, 8).numpy()
    digits = SimpleNamespace(images=numbered, target=numbered[:, 0, 0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "load_digits", lambda: digits)
        parts = quickstart.split_digits(quickstart.Setting(), 1)
    assert sorted(parts) == ["attacker", "dev", "student", "test"]
    numbers = torch.cat([images[:, 0, 0, 0] for images, _ in parts.values()])
    assert numbers.unique().numel() == numbers.numel() == 1797


def test_dir_counts_only_samples_of_other_labels_that_were_right_when_clean(quickstart):
    labels = torch.tensor([0, 1, 1, 2, 2, 3])
    clean = torch.tensor([0, 1, 1, 2, 0, 3])  # the fifth is wrong when clean, the first is of the target label
    exposed = torch.tensor([0, 0, 1, 0, 0, 2])  # of 2nd, 3rd, 4th and 6th, two become 0; the last only becomes wrong
    assert quickstart.defect_inheritance(clean, exposed, labels, 0) == (0.5, 4)


def test_dir_without_a_sample_that_counts_is_refused(quickstart):
    with pytest.raises(ValueError, match="right when clean"):
        quickstart.defect_inheritance(torch.zeros(3).long(), torch.zeros(3).long(), torch.zeros(3).long(), 0)
