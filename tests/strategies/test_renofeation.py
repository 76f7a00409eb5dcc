import copy
import dataclasses

import pytest
import torch
import transformers
from torch.nn import functional

from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import UnsupportedModelError
from remos_hf.strategies.delta import Delta
from remos_hf.strategies.distillation import stage_modules
from remos_hf.strategies.feature_lwf import FeatureLwF
from remos_hf.strategies.plain import Retrain
from remos_hf.strategies.renofeation import DeltaR, Renofeation
from tests import tiny


def image_run(model):
    return lambda batch: (functional.cross_entropy(model(batch[0]), batch[1].long()), None)


def text_run(model):
    def run(batch):
        outputs = model(**batch)
        return outputs.loss, outputs

    return run


def started(strategy, make, seed=3):
    student, teacher = make(), make().eval().requires_grad_(False)
    strategy.prepare(student, tiny.student_data(seed=seed))
    return student, teacher, strategy.hold(student, teacher)


def test_it_starts_as_retraining_does_by_the_runs_seed():
    student, _, _ = started(Renofeation(), tiny.bert)
    by_hand = tiny.bert()
    Retrain(seed=3).prepare(by_hand, tiny.student_data())
    assert all(torch.equal(value, by_hand.state_dict()[key]) for key, value in student.state_dict().items())


def test_its_loss_on_text_is_the_sum_of_its_parts_with_padding_left_out():
    student, teacher, hold = started(Renofeation(distance=2.0, head_decay=0.4, dropout=0.0), tiny.bert)
    batch = tiny.text_batches(1)[0]
    student.eval()
    loss, outputs = hold.loss(student, batch, text_run(student))
    with torch.no_grad():
        mine, theirs = (model(**batch, output_hidden_states=True).hidden_states[1:] for model in (student, teacher))
    real = batch["attention_mask"].bool()
    distance = sum((one - other)[real].square().mean() for one, other in zip(mine, theirs, strict=True))
    head = sum(one.square().sum() for name, one in student.named_parameters()
               if name.startswith(("classifier", "bert.pooler")))  # fmt: skip
    assert loss.item() == pytest.approx((outputs.loss + 2 * distance + 0.2 * head).item(), rel=1e-5)


def test_its_loss_on_images_is_the_sum_of_its_parts():
    recipe = Renofeation(distance=2.0, head_decay=0.0, dropout=0.0, layers=("down", "grouped"), head=("head",))
    student, teacher, hold = started(recipe, tiny.ConvNet)
    batch = tiny.image_batches(1)[0]
    student.eval()
    loss, _ = hold.loss(student, batch, image_run(student))

    def features(model):
        hidden = model.relu(model.norm(model.stem(batch[0])))
        down = model.down(hidden + model.relu(model.conv(hidden)))
        return down, model.grouped(functional.relu(model.depthwise(down)))

    pairs = zip(features(student), features(teacher), strict=True)
    distance = sum((mine - theirs).square().mean() for mine, theirs in pairs)
    assert loss.item() == pytest.approx((image_run(student)(batch)[0] + 2 * distance).item(), rel=1e-5)


def test_it_pulls_the_features_to_the_teachers_and_trains_the_head():
    student, teacher, hold = started(Renofeation(distance=50.0, average_decay=0.0), tiny.bert)
    batch = tiny.text_batches(1)[0]
    optimizer = torch.optim.Adam(student.parameters(), 1e-2)
    student.train()
    losses = []
    for _ in range(60):
        loss, _ = hold.loss(student, batch, text_run(student))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize(("make", "batches", "run"), [(tiny.bert, tiny.text_batches, text_run),
                                                       (tiny.ConvNet, tiny.image_batches, image_run)])  # fmt: skip
def test_dropout_acts_behind_the_compared_feature_on_whole_channels(make, batches, run, no_hooks_left):
    student, _, hold = started(Renofeation(dropout=0.5, head=("head",) if make is tiny.ConvNet else None), make)
    no_hooks_left(student)
    batch = batches(1)[0]
    student.eval()  # so that no dropout of its own acts
    torch.manual_seed(0)
    one = hold.loss(student, batch, run(student))[0]
    other = hold.loss(student, batch, run(student))[0]
    assert one != other
    made = hold._dropped(
        next(iter(hold.layers)), torch.ones(4, 6, 5, 5) if make is tiny.ConvNet else torch.ones(4, 9, 16)
    )
    if make is tiny.ConvNet:
        assert set(made.mean((2, 3)).flatten().tolist()) == {0.0, 2.0}
    else:
        assert set(made.mean(1).flatten().tolist()) == {0.0, 2.0}


def test_the_average_forgets_and_takes_the_students_place_at_the_end():
    recipe = Renofeation(average_decay=0.75, head=("head",))
    student, _, hold = started(recipe, tiny.ConvNet)
    expected = None
    for step in range(4):
        with torch.no_grad():
            student.head.bias.fill_(step)
        hold.after_step(student)
        expected = float(step) if expected is None else 0.75 * expected + 0.25 * step
    student.train()
    before = student.norm.running_mean.clone()
    hold.finish(student, tiny.student_data(tiny.image_batches))
    assert torch.allclose(student.head.bias, torch.full((4,), expected))
    assert not torch.equal(student.norm.running_mean, before)
    stem = torch.stack([student.stem(images).mean((0, 2, 3)) for images, _ in tiny.image_batches()]).mean(0)
    assert torch.allclose(student.norm.running_mean, stem, atol=1e-6)


def test_without_an_average_the_student_stays_as_it_was_trained():
    student, _, hold = started(Renofeation(average_decay=0.0), tiny.bert)
    hold.after_step(student)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    hold.finish(student, None)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert "average" not in hold.state_dict()


def test_published_averages_are_the_mean_of_every_nth_step_after_a_start():
    recipe = Renofeation(average_decay=None, average_start=3, average_every=2, head=("head",))
    student, teacher, hold = started(recipe, tiny.ConvNet)
    for step in range(1, 9):
        if step == 6:  # the average survives a checkpoint
            state, hold = hold.state_dict(), recipe.hold(student, teacher)
            hold.load_state_dict(state)
        with torch.no_grad():
            student.head.bias.fill_(step)
        hold.after_step(student)
    assert hold.averaged == 2
    hold.finish(student, tiny.student_data(tiny.image_batches))
    assert torch.equal(student.head.bias, torch.full((4,), (5 + 7) / 2))
    told = hold.details()["renofeation"]
    assert (told["steps"], told["averaged"], told["weight"]) == (8, 2, 5.0)


def test_a_run_too_short_to_be_averaged_says_so():
    student, _, hold = started(Renofeation(average_decay=None, average_every=500), tiny.bert)
    hold.after_step(student)
    with pytest.warns(UserWarning, match="average every 500 steps.*the run had 1"):
        hold.finish(student, None)


def test_dropout_acts_while_statistics_are_redone_only_if_asked_for():
    found = []
    for asked in (False, True):
        recipe = Renofeation(dropout=0.5, norm_dropout=asked, layers=("stem",), head=("head",))
        student, _, hold = started(recipe, tiny.ConvNet)
        hold.after_step(student)
        student.train()
        torch.manual_seed(0)
        hold.finish(student, tiny.student_data(tiny.image_batches))
        stem = torch.stack([student.stem(images).mean((0, 2, 3)) for images, _ in tiny.image_batches()]).mean(0)
        found.append(torch.allclose(student.norm.running_mean, stem, atol=1e-6))
        assert student.training and student.norm.momentum == 0.1
    assert found == [True, False]


def test_norm_dropout_needs_a_batch_norm():
    with pytest.raises(UnsupportedModelError, match="BertForSequenceClassification has no batch norm"):
        started(Renofeation(norm_dropout=True), tiny.bert)


def test_with_a_projector_the_features_are_mapped_first():
    student, _, hold = started(Renofeation(dropout=0.0, projector=True, head_decay=0.0), tiny.bert)
    batch = tiny.text_batches(1)[0]
    first = hold.loss(student, batch, text_run(student))[0].item()
    for _ in range(30):
        hold.loss(student, batch, text_run(student))
        hold.after_step(student)
    assert hold.loss(student, batch, text_run(student))[0].item() < first
    assert len(hold.projector.maps) == 2 and not any("projector" in name for name in student.state_dict())


def test_delta_r_is_renofeation_without_its_noise():
    plain = Renofeation(dropout=0.0, average_decay=0)
    losses = []
    for recipe in (DeltaR(), plain):
        student, _, hold = started(recipe, tiny.bert)
        losses.append(hold.loss(student, tiny.text_batches(1)[0], text_run(student))[0].item())
        before = {name: one.clone() for name, one in student.state_dict().items()}
        hold.after_step(student)
        hold.finish(student, None)
        assert all(torch.equal(one, before[name]) for name, one in student.state_dict().items())
    assert losses[0] == losses[1]


def test_gradient_checkpointing_is_refused():
    student, _, hold = started(Renofeation(), tiny.bert)
    student.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="Train without gradient_checkpointing"):
        hold.loss(student, tiny.text_batches(1)[0], text_run(student))
    student, _, hold = started(Renofeation(head=("head",)), tiny.ConvNet)
    student.grad_checkpointing = True  # as models of timm say it
    with pytest.raises(ValueError, match="Train without gradient_checkpointing"):
        hold.loss(student, tiny.image_batches(1)[0], image_run(student))


def test_values_out_of_range_are_refused():
    for options in ({"distance": -1}, {"head_decay": float("nan")}, {"dropout": 1}, {"average_decay": 1.0},
                    {"average_every": 0}, {"average_start": -1}, {"projector_rate": 0}):  # fmt: skip
        with pytest.raises(ValueError, match="but got"):
            Renofeation(**options)
    with pytest.raises(ValueError, match="weight is a weight in the loss"):
        DeltaR(-5)


@pytest.mark.parametrize("options", [{"average_start": 3}, {"average_every": 2}, {"norm_dropout": True}])
def test_options_that_would_do_nothing_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.* does nothing with average_decay=0. Leave one"):
        Renofeation(average_decay=0, **options)
    with pytest.raises(ValueError, match="projector_rate=0.1 does nothing with projector=False"):
        Renofeation(projector_rate=0.1)
    assert Renofeation(projector=True, projector_rate=0.1, **options)


@pytest.mark.parametrize(("decay", "expected"), [(None, 1.4975), (0.99, 1.5688)])
def test_the_average_of_half_precision_weights_is_that_of_full_precision(decay, expected):
    student, _, hold = started(Renofeation(average_decay=decay), lambda: tiny.bert().bfloat16())
    for step in range(200):
        with torch.no_grad():
            student.classifier.bias.fill_(1 + step / 200)
        hold.after_step(student)
    hold.finish(student, tiny.student_data())
    bias = student.classifier.bias
    assert bias.dtype == torch.bfloat16 and bias[0].item() == pytest.approx(expected, abs=5e-3)


def test_the_feature_that_is_compared_is_that_before_dropout():
    recipe = Renofeation(dropout=0.5, head_decay=0.0, layers=("grouped",), head=("head",))
    student, _, hold = started(recipe, tiny.ConvNet)
    batch = tiny.image_batches(1)[0]
    student.eval()
    run = lambda given: (0 * student(given[0]).sum(), None)  # noqa: E731
    assert hold.loss(student, batch, run)[0] == hold.loss(student, batch, run)[0]


SIZES = {"num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [8, 16]}
BY_MAPPING = {
    "EfficientNet": {
        "width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320, "image_size": 32,
        "dropout_rate": 0.0, "drop_connect_rate": 0.0,
    },
    "PoolFormer": SIZES | {"patch_sizes": [3, 3], "strides": [2, 2], "padding": [1, 1], "mlp_ratio": 2.0},
    "Pvt": SIZES
    | {
        "image_size": 32, "patch_sizes": [4, 2], "strides": [4, 2], "sequence_reduction_ratios": [2, 1],
        "num_attention_heads": [1, 2], "mlp_ratios": [2, 2],
    },
}  # fmt: skip


@pytest.mark.parametrize("recipe", [DeltaR(), Renofeation(dropout=0.5), FeatureLwF(head_steps=0), Delta(at="stages")])
@pytest.mark.parametrize("name", BY_MAPPING)
def test_parts_of_a_model_that_give_a_mapping_are_compared_and_disturbed(name, recipe):
    config = getattr(transformers, f"{name}Config")(num_labels=3, **BY_MAPPING[name])
    student = getattr(transformers, f"{name}ForImageClassification")(config)
    recipe = dataclasses.replace(recipe, attention="none") if isinstance(recipe, Delta) else recipe
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 2])}
    recipe.prepare(student, tiny.student_data(lambda: [batch], seed=3))
    with torch.no_grad():
        for parameter in student.train().parameters():  # some start at 0
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    hold = recipe.hold(student, teacher)
    run = lambda given: ((made := student(**given)).loss, made)  # noqa: E731
    loss, _ = hold.loss(student, batch, run)
    assert loss.isfinite() and loss.requires_grad
    assert name.lower() not in stage_modules(adapter_for(student))  # a body that ends in its own pooling
    if isinstance(recipe, Renofeation):  # what follows a part reads what dropout left of it
        assert torch.equal(run(batch)[1].logits, run(batch)[1].logits)
        assert not torch.equal(hold.loss(student, batch, run)[1].logits, run(batch)[1].logits)
    else:
        assert loss > run(batch)[0] + 1e-6
