import pytest
import torch
from torch import nn
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from remos_hf.adapters.timm_loading import image_classifier
from remos_hf.adapters.timm_models import ImageClassifier
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import UnsupportedModelError
from remos_hf.strategies.base import Hold
from remos_hf.strategies.delta import Delta
from remos_hf.strategies.distillation import (
    HeldFeatures,
    check_weights,
    feature_modules,
    features_of,
    head_squares,
    last_weights,
    stage_modules,
)
from remos_hf.strategies.distilled import Distilled
from remos_hf.strategies.feature_distance import (
    CARTL_NORMS,
    DELTA_ATTENTION,
    MEAN_SQUARES,
    POOLED_ABSOLUTE,
    UNEXPLAINED,
)
from remos_hf.strategies.feature_lwf import FeatureLwF
from remos_hf.strategies.l2sp import L2SP
from remos_hf.strategies.projector import Projector
from remos_hf.strategies.renofeation import DeltaR, Renofeation, _Disturbed
from tests import tiny
from tests.adapters import timm_nets


def resnet():
    torch.manual_seed(0)
    config = ResNetConfig(num_channels=3, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    return ResNetForImageClassification(config).eval()


def test_blocks_of_transformers_and_stages_of_convolutional_nets_are_found():
    assert list(feature_modules(adapter_for(tiny.bert()))) == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    assert len(feature_modules(adapter_for(tiny.vit()))) == 2
    assert [name.rpartition("stages")[2] for name in feature_modules(adapter_for(resnet()))] == [".0", ".1"]
    plain = feature_modules(adapter_for(tiny.ConvNet(), ("head",)))
    assert list(plain) == ["stem", "norm", "conv", "down", "depthwise", "grouped"]
    inside = feature_modules(adapter_for(ImageClassifier(tiny.ConvNet(), ("head",))))
    assert list(inside) == [f"body.{name}" for name in plain]


def mobilenet():
    torch.manual_seed(0)
    config = MobileNetV2Config(depth_multiplier=0.1, min_depth=4, depth_divisible_by=4, finegrained_output=False)
    return MobileNetV2ForImageClassification(config).eval()


@pytest.mark.parametrize("find", [feature_modules, stage_modules, last_weights])
@pytest.mark.parametrize("make", [mobilenet, resnet, tiny.vit, tiny.bert], ids=lambda make: make.__name__)
def test_whatever_is_found_runs_also_where_a_model_keeps_its_blocks_in_a_list(make, find):
    adapter = adapter_for(make())
    found = find(adapter)
    batch = tiny.text_batches(1)[0] if make is tiny.bert else {"pixel_values": torch.randn(2, 3, 32, 32)}
    batch = tiny.image_batches(1)[0] if make is tiny.vit else batch
    assert features_of(adapter, found, batch).keys() == found.keys() != set()


def test_a_layer_that_does_not_run_is_refused_by_name():
    student, teacher = tiny.ConvNet().eval(), tiny.ConvNet().eval()
    student.unused = teacher.unused = nn.Linear(2, 2).eval()
    hold = DeltaR(layers=("unused",), head=("head",)).hold(student, teacher)
    batch = tiny.image_batches(1)[0]
    with pytest.raises(UnsupportedModelError, match="'unused' did not run"):
        hold.loss(student, batch, lambda given: (student(given[0]).float().square().mean(), None))


def test_named_layers_are_taken_and_unknown_ones_refused():
    adapter = adapter_for(tiny.ConvNet(), ("head",))
    assert list(feature_modules(adapter, ("down",))) == ["down"]
    with pytest.raises(UnsupportedModelError, match="no such modules. Did you mean 'grouped'"):
        feature_modules(adapter, ("groupd",))
    with pytest.raises(UnsupportedModelError, match=r"no such modules\.$"):
        feature_modules(adapter, ("xyz",))
    with pytest.raises(UnsupportedModelError, match=r"Name some: layers=\(\.\.\.\)"):
        feature_modules(adapter_for(nn.Sequential(nn.ReLU()), ()))


def test_features_are_the_outputs_of_the_modules_without_a_graph():
    model = tiny.bert()
    batch = tiny.text_batches(1)[0]
    found = features_of(adapter_for(model), {"one": model.bert.encoder.layer[0]}, batch)["one"]
    with torch.no_grad():
        expected = model(batch["input_ids"], batch["attention_mask"], output_hidden_states=True).hidden_states[1]
    assert torch.equal(found, expected) and not found.requires_grad


class Staged(nn.Module):
    """A stem, two stages, and a head, as torchvision's ResNets have them."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.layer1, self.layer2 = nn.Sequential(Block(), Block()), nn.Sequential(Block())
        self.fc = nn.Linear(4, 2)

    def forward(self, images):
        return self.fc(self.layer2(self.layer1(self.bn1(self.conv1(images)))).mean((2, 3)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.bn = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.downsample = nn.Sequential(nn.Conv2d(4, 4, 1))

    def forward(self, maps):
        return self.bn(self.conv2(self.conv1(maps))) + self.downsample(maps)


def test_stages_of_a_plain_net_are_without_its_stem():
    adapter = adapter_for(Staged(), ("fc",))
    assert list(feature_modules(adapter)) == ["conv1", "bn1", "layer1", "layer2"]
    assert list(stage_modules(adapter)) == ["layer1", "layer2"]
    assert list(stage_modules(adapter, ("conv1",))) == ["conv1"]
    assert "stem" in stage_modules(adapter_for(tiny.ConvNet(), ("head",)))  # a net without stages keeps its children


def test_the_last_convolution_of_a_stage_is_the_last_that_is_no_shortcut_and_of_a_block_its_last_weight():
    assert list(last_weights(adapter_for(Staged(), ("fc",)))) == ["layer1.1.conv2", "layer2.0.conv2"]
    found = list(last_weights(adapter_for(resnet())))
    assert len(found) == 2 and not any("shortcut" in name for name in found)
    blocks = [f"bert.encoder.layer.{block}.output.dense" for block in range(2)]
    assert list(last_weights(adapter_for(tiny.bert()))) == blocks
    assert list(last_weights(adapter_for(tiny.gpt2()))) == [f"transformer.h.{block}.mlp.c_proj" for block in range(2)]


@pytest.mark.timm
def test_the_last_convolutions_of_a_net_of_timm_are_those_of_its_stages():
    timm = image_classifier("resnet18", pretrained=False, num_labels=2)
    assert list(last_weights(adapter_for(timm))) == [f"body.layer{stage}.1.conv2" for stage in range(1, 5)]
    assert list(last_weights(adapter_for(tiny.ConvNet(), ("head",)), ("down",))) == ["down"]


def test_only_what_trains_in_the_head_is_decayed():
    model = tiny.bert()
    model.bert.pooler.requires_grad_(False)
    squares = head_squares(model, ("bert.pooler", "classifier"))
    assert squares.item() == pytest.approx(sum(one.square().sum().item() for one in model.classifier.parameters()))


def held(model, **more):
    adapter = adapter_for(model, ("head",))
    return HeldFeatures("it", adapter, feature_modules(adapter, ("down",)), MEAN_SQUARES, 1.0, **more)


def test_a_teacher_in_train_mode_is_refused():
    with pytest.raises(ValueError, match="ConvNet, is in train mode.*teacher.eval"):
        held(tiny.ConvNet().train())
    half = tiny.ConvNet().eval()
    half.norm.train()
    with pytest.raises(ValueError, match="in train mode"):
        held(half)


def test_teachers_of_another_width_need_a_projector_which_trains_and_resumes():
    student, teacher = tiny.ConvNet(), tiny.ConvNet(1).eval().requires_grad_(False)
    teacher.down, teacher.depthwise = nn.Conv2d(8, 9, 1), nn.Conv2d(9, 9, 3, padding=1, groups=9)
    teacher.grouped = nn.Conv2d(9, 6, 1, groups=3)
    teacher.eval()
    batch = tiny.image_batches(1)[0]
    run = lambda given: (student(given[0]).square().mean(), None)  # noqa: E731
    with pytest.raises(UnsupportedModelError, match=r"\(4, 12, 8, 8\) in the student and \(4, 9, 8, 8\)"):
        held(teacher).loss(student, batch, run)
    hold = held(teacher, projector=Projector(0.1, 0))
    losses = []
    for _ in range(5):
        losses.append(hold.loss(student, batch, run)[0].item())
        hold.after_step(student)
    assert losses[-1] < losses[0] and hold.projector.maps["down"].shape == (9, 12)
    again = held(teacher, projector=Projector(0.1, 5))
    again.load_state_dict(hold.state_dict())
    assert torch.equal(again.loss(student, batch, run)[0], hold.loss(student, batch, run)[0])
    assert again.details()["it"]["steps"] == 5


def test_a_weight_in_the_loss_is_at_least_0_and_finite():
    for value in (-1, float("nan"), float("inf")):
        recipe = type("Recipe", (), {"weight": value, "layers": None, "head": None})()
        with pytest.raises(ValueError, match="weight is a weight in the loss, at least 0"):
            check_weights(recipe, "weight")


@pytest.mark.parametrize("kind", [Delta, DeltaR, Distilled, FeatureLwF, Renofeation])
def test_no_layer_at_all_is_refused(kind):
    with pytest.raises(ValueError, match=r"layers names the modules .* but got \(\)"):
        kind(layers=[])


def test_the_teacher_runs_in_the_precision_that_is_laid_on_the_students_forward():
    student, teacher = tiny.ConvNet().eval(), tiny.ConvNet().eval().requires_grad_(False)
    batch, seen = tiny.image_batches(1)[0], []
    teacher.down.register_forward_hook(lambda _, __, made: seen.append(made.dtype))
    run = lambda given: (student(given[0]).float().square().mean(), None)  # noqa: E731
    held(teacher).loss(student, batch, run)
    student.forward = torch.autocast("cpu", torch.bfloat16)(student.forward)
    assert held(teacher).loss(student, batch, run)[0] == run(batch)[0]  # the very teacher is at distance 0
    assert seen == [torch.float32, torch.bfloat16] and not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("kind", [Delta, DeltaR, Distilled, FeatureLwF, L2SP, Renofeation])
def test_a_plain_module_must_say_what_its_head_is_before_anything_is_held_to_the_teacher(kind):
    student, teacher = tiny.ConvNet().eval(), tiny.ConvNet().eval()
    with pytest.raises(UnsupportedModelError, match=r"ConvNet names no head.*head=\(\.\.\.,\).*'grouped', 'head'\]"):
        kind().hold(student, teacher)
    assert kind(head=("head",)).hold(student, teacher) and kind(head=()).hold(student, teacher)
    assert kind().hold(tiny.bert(), tiny.bert())


@pytest.mark.parametrize("kind", [DeltaR, Renofeation])
def test_a_student_whose_head_is_not_named_is_not_started_anew(kind):
    student = tiny.ConvNet()
    before = {name: one.clone() for name, one in student.state_dict().items()}
    with pytest.raises(UnsupportedModelError, match="names no head"):
        kind().prepare(student, tiny.student_data())
    assert all(torch.equal(one, before[name]) for name, one in student.state_dict().items())


@pytest.mark.parametrize("clean", [(0, 0, 0), (0, 1, 0), (2, 4, 1)], ids=str)
@pytest.mark.parametrize(
    "recipe", [DeltaR(head_decay=0, head=("head",)), FeatureLwF(head_steps=0, head=("head",))], ids=str
)
def test_the_record_counts_the_batches_that_were_compared_and_a_run_of_none_warns(clean, recipe, recwarn):
    student, teacher = tiny.ConvNet().eval(), tiny.ConvNet(1).eval()
    hold, run = recipe.hold(student, teacher), lambda given: (student(given[0]).square().mean(), None)
    for step, count in enumerate(clean):
        if step == 1:  # a checkpoint holds what was counted
            state, hold = hold.state_dict(), recipe.hold(student, teacher)
            hold.load_state_dict(state)
        beside = Hold()
        beside.clean, hold.around = torch.arange(4) < count, [beside]
        batch = tiny.image_batches(1)[0]
        assert (hold.loss(student, batch, run)[0] == run(batch)[0]) == (count == 0)
        hold.after_step(student)
    hold.finish(student, tiny.student_data())
    (told,) = hold.details().values()
    assert told["batches_compared"] == sum(count > 0 for count in clean) and told["steps"] == 3
    told = [str(one.message) for one in recwarn if "(remos_hf)" in str(one.message)]
    assert ["no sample of 3 batches was left clean" in one for one in told] == [True] * (not any(clean))


@pytest.mark.timm
@pytest.mark.parametrize("distance", [MEAN_SQUARES, DELTA_ATTENTION, CARTL_NORMS, POOLED_ABSOLUTE, UNEXPLAINED])
@pytest.mark.parametrize("weighed", [False, True])
def test_maps_with_channels_last_are_as_far_apart_as_the_same_with_channels_second(distance, weighed):
    teacher = timm_nets.swin().eval().requires_grad_(False)
    adapter = adapter_for(teacher)
    modules = stage_modules(adapter)
    hold = HeldFeatures("it", adapter, modules, distance, 1.0)
    shapes = {name: (3, 4, 2, width) for name, width in zip(modules, (8, 16), strict=True)}
    made, wanted = ({name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(2))
    channels = {name: torch.rand(shape[-1]) for name, shape in shapes.items()} if weighed else None
    hold.channels = channels
    moved = [{name: one.permute(0, 3, 1, 2).contiguous() for name, one in given.items()} for given in (made, wanted)]
    assert torch.allclose(hold._away(made, wanted, []), distance(*moved, [], channels), rtol=1e-6)


@pytest.mark.timm
def test_a_projector_maps_the_channels_of_maps_that_have_them_last():
    teacher = timm_nets.swin().eval().requires_grad_(False)
    hold = _Disturbed(Renofeation(projector=True, dropout=0.5), timm_nets.swin(), teacher)
    images = torch.randn(2, 3, timm_nets.PIXELS, timm_nets.PIXELS)
    student = timm_nets.swin()
    loss, _ = hold.loss(
        student, (images, torch.tensor([0, 1])), lambda given: (student(given[0]).square().mean(), None)
    )
    assert loss.requires_grad and [one.shape for one in hold.projector.maps.values()] == [(8, 8), (16, 16)]
    dropped = hold._dropped("layers.0", torch.ones(3, 4, 2, 8))
    assert set(dropped.mean((1, 2)).flatten().tolist()) == {0.0, 2.0}
