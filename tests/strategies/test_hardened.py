import copy
import dataclasses

import pytest
import torch
from torch.nn import functional

from remos_hf.errors import UnsupportedModelError
from remos_hf.strategies.hardened import Hardened
from tests import tiny
from tests.training.runs import trainer


def image_run(model, seen=None):
    def run(batch):
        if seen is not None:
            seen.append(batch)
        return functional.cross_entropy(model(batch[0]), batch[1].long()), None

    return run


def text_run(model, seen=None):
    def run(batch):
        if seen is not None:
            seen.append(batch)
        outputs = model(**batch)
        return outputs.loss, outputs

    return run


KINDS = {
    "images": (tiny.ConvNet, tiny.image_batches, image_run, Hardened(seed=1)),
    "inserted": (tiny.bert, tiny.text_batches, text_run, Hardened(seed=1, tokens=2)),
    "added": (tiny.bert, tiny.text_batches, text_run, Hardened(seed=1, tokens=0)),
}


def held(kind, **changes):
    make, batches, run, recipe = KINDS[kind]
    recipe = dataclasses.replace(recipe, **changes)
    model = make()
    return model, recipe.hold(model, copy.deepcopy(model)), batches(4), run(model)


@pytest.mark.parametrize("kind", KINDS)
def test_perturbations_never_leave_their_ball_and_reach_its_edge(kind):
    model, hold, batches, run = held(kind, step=0.6)
    for batch in batches * 2:
        hold.loss(model, batch, run)[0].backward()
        hold.after_step(model)
        length = (hold.rows - hold.centre).norm(dim=1)
        assert (length <= hold.eps * (1 + 1e-5)).all()
    assert (length > 0.99 * hold.eps).any()
    sizes = hold.details()["hardened"]["root_mean_squares"]
    expected = 0.19 if kind == "images" else hold.eps / 16**0.5
    assert max(sizes) == pytest.approx(expected, rel=1e-2)


def test_half_of_a_batch_is_perturbed_by_shared_patterns_and_the_labels_and_the_rest_stay():
    model, hold, batches, _ = held("images", perturbations=2)
    seen = []
    batches = tiny.image_batches(3, size=8)
    for images, labels in batches:
        before = images.clone()
        hold.loss(model, (images, labels), image_run(model, seen))[0].backward()
        hold.after_step(model)
        assert torch.equal(images, before) and seen[-1][1] is labels
    change = (seen[-1][0] - batches[-1][0]).flatten(1)
    changed = change.any(1)
    assert changed.sum() == 4 and torch.equal(hold.clean, ~changed)
    assert len({tuple(row.round(decimals=4).tolist()) for row in change[changed]}) <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_raises_the_loss_of_a_student_that_stands_still(kind):
    model, hold, batches, run = held(kind, share=1.0, perturbations=1, step=0.3)
    batch = batches[0]
    state = hold.generator.get_state()  # the same places each time
    losses = []
    for _ in range(6):
        hold.generator.set_state(state)
        loss, _ = hold.loss(model, batch, run)
        losses.append(loss.item())
        loss.backward()
        hold.after_step(model)
    assert losses[-1] > losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_neither_the_scale_of_a_loss_nor_its_cut_into_batches_changes_a_step(kind):
    rows = []
    for scale, pieces in ((1.0, 1), (65536.0, 1), (0.5, 2)):
        model, hold, batches, run = held(kind, share=1.0)
        for _ in range(pieces):
            hold.generator.manual_seed(3)
            (hold.loss(model, batches[0], run)[0] * scale).backward()
        hold.after_step(model)
        rows.append(hold.rows.detach())
    assert torch.allclose(rows[0], rows[1], atol=1e-6) and torch.allclose(rows[0], rows[2], atol=1e-6)


def test_a_gradient_that_overflowed_moves_nothing():
    model, hold, batches, run = held("images")
    (hold.loss(model, batches[0], run)[0] * float("inf")).backward()
    hold.after_step(model)
    assert not hold.rows.any()


def test_a_pattern_that_the_data_never_shows_is_trained_away():
    """A linear student reads a feature that is always 0 in its data, as a backdoor's would be."""
    reads = {}
    for kind in ("plain", "hardened"):
        torch.manual_seed(0)
        model = torch.nn.Linear(6, 2)
        with torch.no_grad():
            model.weight[:, 5] = torch.tensor([3.0, -3.0])
        hold = Hardened(radius=0.3, seed=0).hold(model, None)
        optimizer, run = torch.optim.SGD(model.parameters(), 0.2), image_run(model)
        for _ in range(150):
            x = torch.randn(16, 6)
            x[:, 5] = 0
            batch = (x, (x[:, 0] > 0).long())
            loss, _ = run(batch) if kind == "plain" else hold.loss(model, batch, run)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            hold.after_step(model)
        reads[kind] = (model.weight[0, 5] - model.weight[1, 5]).item()
    assert reads["plain"] == pytest.approx(6.0) and reads["hardened"] < 3.0


def test_images_of_another_size_are_refused():
    model, hold, batches, run = held("images")
    hold.loss(model, batches[0], run)
    with pytest.raises(UnsupportedModelError, match=r"need one size.*\(3, 8, 8\).*now came \(3, 6, 6\).*Resize"):
        hold.loss(model, tiny.image_batches(1, pixels=6)[0], run)


def test_it_is_off_while_the_student_is_evaluated(tmp_path):
    ours = trainer(tmp_path, strategy=Hardened(), options={"save_strategy": "no"})
    ours.train()
    hold = ours.moments.hold
    before, rows = hold.generator.get_state(), hold.rows.detach().clone()
    loss = ours.evaluate()["eval_loss"]
    with torch.no_grad():
        outputs = [ours.model(**tiny.pad(ours.eval_dataset[start : start + 4])) for start in (0, 4)]
    assert loss == pytest.approx(sum(one.loss.item() for one in outputs) / 2, rel=1e-5)
    assert torch.equal(before, hold.generator.get_state()) and torch.equal(rows, hold.rows)
    assert ours.moments.sidecars.config["finish"]["hardened"]["texts_cut"] == 0


def test_it_works_with_gradient_checkpointing_and_accumulated_batches(tmp_path):
    ours = trainer(tmp_path, strategy=Hardened(), options={
        "save_strategy": "no", "gradient_checkpointing": True, "gradient_accumulation_steps": 2, "max_steps": 2,
        "per_device_train_batch_size": 2, "gradient_checkpointing_kwargs": {"use_reentrant": True}})  # fmt: skip
    ours.train()
    assert max(ours.moments.sidecars.config["finish"]["hardened"]["root_mean_squares"]) > 0


def test_values_that_no_run_could_use_are_refused():
    for options in ({"radius": 0}, {"step": float("nan")}, {"text_radius": -1}, {"share": 0}, {"share": 1.1},
                    {"perturbations": 0}, {"tokens": -1}, {"tokens": True}):  # fmt: skip
        with pytest.raises(ValueError, match="but got"):
            Hardened(**options)
