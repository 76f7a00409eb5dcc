import copy

import pytest
import torch
from accelerate import debug_launcher
from torch import nn

from remos_hf.strategies.feature_lwf import FeatureLwF
from remos_hf.training.accelerate_loop import fit
from tests import tiny
from tests.strategies.test_distilled import moved
from tests.strategies.test_hardened import image_run, text_run


def test_its_loss_on_text_is_the_l1_distance_of_the_last_blocks_mean_over_real_tokens():
    student, teacher, hold = moved(tiny.bert, FeatureLwF(0.3, head_steps=0))
    batch = tiny.text_batches(1)[0]
    loss, outputs = hold.loss(student, batch, text_run(student))
    real = batch["attention_mask"][..., None]
    with torch.no_grad():
        mine, theirs = (model(**batch, output_hidden_states=True).hidden_states[-1] for model in (student, teacher))
    away = ((mine * real).sum(1) - (theirs * real).sum(1)) / real.sum(1)
    assert loss.item() == pytest.approx((outputs.loss + 0.3 * away.abs().sum(1).mean()).item(), rel=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_head_learns_alone_first_and_then_all_of_it(decay):
    student, _, hold = moved(tiny.ConvNet, FeatureLwF(head_steps=2, head=("head",)))
    student.train()
    optimizer = torch.optim.SGD(student.parameters(), 0.5, momentum=0.9, weight_decay=decay)
    still = []
    for _ in range(3):
        before = copy.deepcopy(student.state_dict())
        hold.loss(student, tiny.image_batches(1)[0], image_run(student))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        hold.after_step(student)
        after = student.state_dict()
        still.append([name for name in after if torch.equal(after[name], before[name])])
        assert student.training and all(one.requires_grad for one in student.parameters())
    body = {name for name in student.state_dict() if not name.startswith("head")}
    assert set(still[0]) == set(still[1]) == body and not set(still[2]) & {"stem.weight", "norm.running_mean"}
    told = hold.details()["feature_lwf"]
    assert (told["layers"], told["steps"], told["head_steps"]) == (["grouped"], 3, 2)


@pytest.mark.parametrize(("steps", "warns"), [(3, True), (2, True), (4, False)])
def test_a_run_that_ends_with_the_head_alone_warns_and_names_half_of_it(steps, warns, recwarn):
    student, _, hold = moved(tiny.ConvNet, FeatureLwF(head_steps=3, head=("head",)))
    for _ in range(steps):
        hold.after_step(student)
    hold.finish(student, tiny.student_data())
    told = [str(one.message) for one in recwarn]
    assert [f"head_steps={steps // 2}." in one for one in told] == [True] * warns


def test_where_it_is_goes_into_a_checkpoint():
    recipe = FeatureLwF(head_steps=3, head=("head",))
    student, teacher, hold = moved(tiny.ConvNet, recipe)
    for _ in range(4):
        hold.after_step(student)
    again = recipe.hold(student, teacher)
    again.load_state_dict(hold.state_dict())
    batch = tiny.image_batches(1)[0]
    assert again.loss(student, batch, image_run(student))[0] > image_run(student)(batch)[0]


def test_a_head_that_does_not_train_is_refused():
    student, _, hold = moved(tiny.ConvNet, FeatureLwF(head=("head",)))
    nn.Module.requires_grad_(student.head, False)
    with pytest.raises(ValueError, match=r"no parameter of \['head'\] trains.*head_steps=0"):
        hold.loss(student, tiny.image_batches(1)[0], image_run(student))


def test_values_that_no_run_could_use_are_refused():
    with pytest.raises(ValueError, match="weight is a weight in the loss"):
        FeatureLwF(-1)
    with pytest.raises(ValueError, match="head_steps is a whole number"):
        FeatureLwF(head_steps=-1)


def _head_alone(folder):
    student = fit(
        tiny.bert(), tiny.dataset(), strategy=FeatureLwF(head_steps=2), collate_fn=tiny.pad, batch_size=4, max_steps=2,
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1), progress=False,
    ).model  # fmt: skip
    before = tiny.bert().state_dict()
    still = {name for name, one in student.state_dict().items() if torch.equal(one, before[name])}
    assert still == {name for name in before if not name.startswith(("classifier", "bert.pooler"))}
    (folder / str(torch.distributed.get_rank())).touch()


def test_in_two_processes_the_body_stays_as_it_was_although_the_optimizer_decays_weights(tmp_path):
    debug_launcher(_head_alone, args=(tmp_path,), num_processes=2)
    assert {one.name for one in tmp_path.iterdir()} >= {"0", "1"}
