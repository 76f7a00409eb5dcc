import pytest

from tests.defects import pictures
from tests.evaluation.test_robustness import BETWEEN, DATA, TASK, Brightness

pytest.importorskip("art")
from remos_hf.evaluation.auto_attack import auto_attack_robustness  # noqa: E402


def test_each_attack_gets_what_the_last_left_and_what_was_left_out_is_told():
    found = auto_attack_robustness(Brightness(), DATA, TASK, eps=BETWEEN, steps=10, queries=20)
    assert list(found["standing"]) == ["APGD-CE", "APGD-DLR", "Square"]
    standing = list(found["standing"].values())
    assert standing == sorted(standing, reverse=True)
    assert found["acc"]["count"] == 7 and found["robust_acc"]["num_samples"] == 8
    assert found["robust_acc"]["count"] == 3 == standing[-1]
    assert "ART" in found["name"] and any("FAB" in one for one in found["left_out"])


def test_a_model_is_put_back_and_the_same_seed_finds_the_same():
    model = pictures.Residual().train()
    one, two = (auto_attack_robustness(model, DATA, TASK, eps=0.05, steps=3, queries=5) for _ in range(2))
    assert one == two and model.training and model.fc.weight.requires_grad


@pytest.mark.parametrize("eps", [0, 8])
def test_a_budget_that_is_none_of_pixels_is_refused(eps):
    with pytest.raises(ValueError, match=f"eps is {eps}, but pixels"):
        auto_attack_robustness(Brightness(), DATA, TASK, eps=eps)
