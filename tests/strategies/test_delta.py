import pytest
import torch

from remos_hf.strategies.delta import Delta
from remos_hf.strategies.feature_lwf import FeatureLwF
from remos_hf.strategies.l2sp import L2SP
from remos_hf.strategies.renofeation import DeltaR, Renofeation
from tests import tiny
from tests.strategies.test_distilled import moved
from tests.strategies.test_hardened import image_run, text_run

NET = {"layers": ("down", "grouped"), "head": ("head",)}


def outputs_of(model, images):
    hidden = model.relu(model.norm(model.stem(images)))
    down = model.down(hidden + model.relu(model.conv(hidden)))
    return {"down": down, "grouped": model.grouped(torch.relu(model.depthwise(down)))}


@pytest.mark.parametrize("attention", ["silenced", "gradient_x_activation", "none"])
def test_its_loss_is_the_published_one(attention):
    student, teacher, hold = moved(tiny.ConvNet, Delta(0.3, 0.4, attention, head_steps=2, **NET))
    student.eval()
    data, batch = tiny.student_data(tiny.image_batches), tiny.image_batches(1)[0]
    hold.begin(student, data)
    loss, _ = hold.loss(student, batch, image_run(student))
    with torch.no_grad():
        mine, theirs = outputs_of(student, batch[0]), outputs_of(teacher, batch[0])
        expected = image_run(student)(batch)[0]
        for name, one in mine.items():
            away = (one - theirs[name]).square().sum((2, 3))  # (samples, channels)
            if attention != "none":
                away = away * hold.channels[name] / one[0, 0].numel()
            expected += 0.3 * 0.5 * away.sum()
        expected += 0.2 * sum(one.square().sum() for one in student.head.parameters())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (hold.channels is None) == (attention == "none")


def test_as_remos_and_renofeation_have_it_it_is_the_mean_over_stages():
    recipe = Delta(0.5, 0.0, "none", reduction="mean", at="stages")
    student, teacher, hold = moved(tiny.bert, recipe)
    batch = tiny.text_batches(1)[0]
    loss, outputs = hold.loss(student, batch, text_run(student))
    with torch.no_grad():
        pairs = [model(**batch, output_hidden_states=True).hidden_states[1:] for model in (student, teacher)]
    real = batch["attention_mask"].bool()
    away = sum((one - other)[real].square().mean() for one, other in zip(*pairs, strict=True))
    assert loss.item() == pytest.approx((outputs.loss + 0.5 * away).item(), rel=1e-5)


def test_channels_are_weighed_by_the_teacher_under_a_trained_head_and_kept_over_a_checkpoint():
    recipe = Delta(head_steps=3, samples=12, **NET).with_seed(0)
    student, teacher, hold = moved(tiny.ConvNet, recipe)
    before = {name: one.clone() for name, one in teacher.state_dict().items()}
    hold.begin(student, tiny.student_data(tiny.image_batches))
    assert all(torch.equal(one, before[name]) for name, one in teacher.state_dict().items())
    again = recipe.hold(student, teacher)
    again.load_state_dict(hold.state_dict())
    told = again.details()["delta"]
    assert told["head_steps"] == 3 and told["attention"] == "silenced"
    assert set(told["channel_weights"]) == {*NET["layers"]}
    for name, weights in again.channels.items():
        assert torch.equal(weights, hold.channels[name]) and weights.mean().item() == pytest.approx(1)
        assert weights.std() > 0.01
        assert told["channel_weights"][name] == [weights.min().item(), weights.max().item()]


def test_a_channel_that_the_task_does_not_read_weighs_least():
    def deaf():
        net = tiny.ConvNet()
        with torch.no_grad():
            net.head.weight[:, 2] = 0
        return net

    student, _, hold = moved(deaf, Delta(head_steps=0, layers=("grouped",), head=("head",)), change=0.0)
    data = tiny.student_data(lambda: [(images, torch.arange(4.0)) for images, _ in tiny.image_batches()])
    hold.begin(student, data)
    weights = hold.channels["grouped"]
    assert len(weights) == 6 and weights[2] < 1 < weights.max()


def test_values_that_no_run_could_use_are_refused():
    for options, told in (
        ({"weight": -0.1}, "weight is a weight in the loss"),
        ({"head_decay": float("inf")}, "head_decay is a weight"),
        ({"attention": "gradient"}, "attention is one of silenced, gradient_x_activation, none"),
        ({"reduction": "max"}, "reduction is one of"),
        ({"at": "blocks"}, "at is one of"),
        ({"samples": 0}, "samples is a whole number"),
    ):
        with pytest.raises(ValueError, match=told):
            Delta(**options)


@pytest.mark.parametrize(
    "recipe",
    [
        Delta(head_steps=2, samples=12),
        FeatureLwF(head_steps=0),
        DeltaR(),
        Renofeation(dropout=0.0),
        Renofeation(dropout=0.0, projector=True),
        L2SP(),
    ],
    ids=lambda recipe: type(recipe).__name__,
)
def test_in_bf16_every_transfer_strategy_adds_what_it_adds_in_full_precision(recipe):
    found = []
    for low in (False, True):
        torch.manual_seed(0)
        student, _, hold = moved(tiny.bert, recipe.with_seed(0), change=0.3)
        hold.begin(student, tiny.student_data())
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss, outputs = hold.loss(student.eval(), tiny.text_batches(1)[0], text_run(student))
        loss.backward()
        hold.after_step(student)
        added = (loss - outputs.loss).item()
        size = sum(one.grad.float().norm().item() for one in student.bert.encoder.parameters())
        found.append((added, size))
    assert found[1][0] == pytest.approx(found[0][0], rel=0.1) and found[0][0] > 0
    assert found[1][1] == pytest.approx(found[0][1], rel=0.2)


def test_it_compares_what_the_last_weight_of_a_stage_gives_unless_stages_are_asked_for():
    for recipe, ends in ((Delta(), ".output.dense"), (Delta(at="stages"), "")):
        _, _, hold = moved(tiny.bert, recipe)
        assert list(hold.layers) == [f"bert.encoder.layer.{block}{ends}" for block in range(2)]
