import copy
import json

import pytest
import torch
from safetensors.torch import load_file, load_model
from torch import nn
from torch.nn import functional
from transformers import TrainingArguments

from remos_hf.activations import capture, watch
from remos_hf.adapters.base import Adapter
from remos_hf.adapters.timm_loading import image_classifier
from remos_hf.adapters.timm_models import ImageClassifier, TimmAdapter
from remos_hf.adapters.transformers_models import adapter_for, with_new_head
from remos_hf.errors import UnsupportedModelError
from remos_hf.profiling.criteria import strong_coverage, threshold_coverage
from remos_hf.profiling.data_pass import profile_coverage
from remos_hf.slicing.refill import reset_outside
from remos_hf.slicing.relevant_slice import choose_slice
from remos_hf.training.trainer import RemosTrainer
from tests import reference, tiny
from tests.adapters import timm_nets

needs_timm = pytest.mark.timm
pytestmark = pytest.mark.filterwarnings("ignore:.*never covered.*:UserWarning", "ignore::FutureWarning")

FAMILIES = (
    "resnet",
    "convnext",
    "mobilenet_v2",
    "mobilenet_v3",
    "vit",
    "swin",
    "swin_v2",
    "beit",
    "maxvit",
    "tiny_vit",
)


def net(family, **options):
    return timm_nets.made(getattr(timm_nets, family), **options)


def wrapper(labels=timm_nets.LABELS, seed=0):
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    torch.manual_seed(seed)
    small = {"layers": (1, 1, 1, 1), "channels": (8, 8, 12, 16)}
    config = TimmWrapperConfig(architecture="resnet18", num_labels=labels, model_args=small)
    return TimmWrapperForImageClassification(config).eval()


def state(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def without_head(model):
    return {name: tensor for name, tensor in state(model).items() if not name.startswith("fc.")}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def pixels(count=3, seed=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, timm_nets.PIXELS, timm_nets.PIXELS, generator=generator)


def one_by_one(model, layers, kind, parameter):
    """Brute force: every image runs alone, so that all that a layer sees is its own, windows and all."""
    counts = {}
    for batch in timm_nets.images():
        for image in batch["pixel_values"] if isinstance(batch, dict) else batch[0]:
            kept = {}

            def keep(name, given, made, kept=kept):
                kept[name, "input"], kept[name, "output"] = given.clone(), made.clone()

            with torch.no_grad(), watch({name: layer.module for name, layer in layers.items()}, keep):
                model(image[None])
            for (name, end), activation in _and_loose_qkv(model, kept, image).items():
                layer = layers[name]
                convolution = isinstance(layer.module, nn.Conv2d)
                parts = [activation]
                if end == "output" and layer.part_sizes and not layer.part_heads:
                    parts = activation.chunk(3, dim=-1)
                rows = []
                for part in parts:
                    whole = part.movedim(1, -1) if convolution else part
                    means = reference.scaled_means(whole.reshape(-1, whole.shape[-1]).numpy(), -1)
                    row = reference.covered(means, kind, parameter)
                    rows.append(torch.zeros(whole.shape[-1]) if row is None else torch.from_numpy(row))
                counts[name, end] = counts.get((name, end), 0) + torch.cat(rows).long()
    return counts


def _and_loose_qkv(model, kept, image):
    """Add the qkv layers whose bias lies beside them: the model computes them without calling them."""
    for name, module in model.named_modules():
        if getattr(module, "q_bias", None) is None:
            continue
        seen = {}
        with torch.no_grad(), watch({name: module}, lambda _, given, made, seen=seen: seen.update(given=given)):
            model(image[None])
        bias = torch.cat([module.q_bias, module.k_bias, module.v_bias]).detach()
        kept[f"{name}.qkv", "input"] = seen["given"]
        kept[f"{name}.qkv", "output"] = functional.linear(seen["given"], module.qkv.weight, bias).detach()
    return kept


# MaxViT and TinyViT interleave q, k and v by head: tested by what their attention is given, below.
@needs_timm
@pytest.mark.parametrize(("kind", "parameter"), [("nc", 0.5), ("nc", 0.4), ("snac", 2)])
@pytest.mark.parametrize("family", FAMILIES[:8])
def test_coverage_is_that_of_each_image_run_alone(family, kind, parameter):
    model = net(family)
    layers = adapter_for(model).layers()
    criterion = threshold_coverage(parameter) if kind == "nc" else strong_coverage(parameter)
    profile = profile_coverage(model, timm_nets.images(), criterion=criterion, progress=False)
    expected = one_by_one(model, layers, kind, parameter)
    assert set(profile.input_counts) == set(layers)
    assert len(expected) == 2 * len(layers)
    for (layer, end), counts in expected.items():
        assert torch.equal(getattr(profile, f"{end}_counts")[layer], counts), (layer, end)
    assert any(counts.any() for (_, end), counts in expected.items() if end == "output")


@needs_timm
@pytest.mark.parametrize("family", FAMILIES)
def test_only_weights_of_the_body_are_sliced_and_all_else_stays(family):
    model = net(family)
    layers, before = adapter_for(model).layers(), state(model)
    profile = profile_coverage(model, timm_nets.images(), progress=False)
    relevant = choose_slice(model, profile, slice_ratio=0.7, progress=False)
    reset_outside(model, relevant)
    after = state(model)
    assert set(relevant.kept) == {layer.parameter_name for layer in layers.values()}
    for name, tensor in before.items():
        expected = tensor * relevant.kept[name] if name in relevant.kept else tensor
        assert torch.equal(after[name], expected), name
    head = adapter_for(model).head
    assert not any(name.startswith(head) for name in relevant.kept)
    assert relevant.num_kept < relevant.num_weights
    assert model(pixels()).isfinite().all()


@needs_timm
@pytest.mark.parametrize("family", ["vit", "swin", "beit", "maxvit", "tiny_vit", "hiera"])
def test_a_fused_qkv_is_cut_into_what_attention_is_given(family, monkeypatch):
    model, given, made = net(family), [], []
    layers = {name: layer for name, layer in adapter_for(model).layers().items() if name.endswith("qkv")}
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
    attention = functional.scaled_dot_product_attention
    monkeypatch.setattr(
        functional,
        "scaled_dot_product_attention",
        lambda q, k, v, **rest: (given.append((q, k, v)), attention(q, k, v, **rest))[1],
    )
    with torch.no_grad(), watch({n: x.module for n, x in layers.items()}, lambda n, _, out: made.append((n, out))):
        adapter_for(model).forward(pixels())
    assert len(given) == len(made) == len(layers) > 1
    for (name, out), inputs in zip(made, given, strict=True):
        parts = layers[name].split_parts(out)
        assert len(parts) == 3
        # Hiera pools its queries; order of windows and heads is the model's own business, that of values is not.
        for part, tensor in list(zip(parts, inputs, strict=True))[1 if family == "hiera" else 0 :]:
            heads_last = tensor.movedim(1, -2).flatten(-2)
            assert torch.equal(part.reshape(-1).sort().values, heads_last.reshape(-1).sort().values), name
        counts = torch.arange(layers[name].out_neurons)[None]
        assert torch.equal(layers[name].join_parts(layers[name].split_parts(counts)), counts)


@needs_timm
@pytest.mark.parametrize(
    ("family", "head", "feature", "blocks"),
    [
        ("resnet", ("fc",), "fc", ["layer1", "layer2", "layer3", "layer4"]),
        ("convnext", ("head.fc",), "head.fc", [f"stages.{i}" for i in range(4)]),
        ("mobilenet_v2", ("classifier",), "classifier", [f"blocks.{i}" for i in range(3)]),
        ("mobilenet_v3", ("classifier",), "classifier", [f"blocks.{i}" for i in range(3)]),
        ("vit", ("head",), "head", ["blocks.0", "blocks.1"]),
        ("distilled_vit", ("head", "head_dist"), "head", ["blocks.0", "blocks.1"]),
        ("swin", ("head.fc",), "head.fc", ["layers.0", "layers.1"]),
        ("dla", ("fc",), "fc", [f"level{i}" for i in range(1, 6)]),
    ],
)
def test_the_head_the_blocks_and_the_feature_are_what_timm_names(family, head, feature, blocks):
    model = net(family)
    for prefix, whole in (("", model), ("body.", ImageClassifier(model))):
        adapter = adapter_for(whole)
        assert adapter.head == tuple(f"{prefix}{name}" for name in head)
        assert adapter.feature_layer() == f"{prefix}{feature}"
        assert list(adapter.blocks()) == [f"{prefix}{name}" for name in blocks]
        assert adapter.blocks()[f"{prefix}{blocks[0]}"] is model.get_submodule(blocks[0])


@needs_timm
@pytest.mark.parametrize("family", [*FAMILIES, "distilled_vit", "dla"])
def test_the_penultimate_feature_gives_the_logits(family):
    model, seen = net(family), {}
    adapter = adapter_for(model)
    layer = model.get_submodule(adapter.feature_layer())
    with torch.no_grad(), watch({"feature": layer}, lambda _, given, made: seen.update(given=given, made=made)):
        logits = model(pixels())
    assert seen["given"].flatten(1).shape == (3, layer.weight.shape[1])
    if family == "distilled_vit":  # the mean of two heads
        assert seen["made"].shape == logits.shape
    else:
        assert torch.equal(seen["made"].flatten(1), logits)


@needs_timm
def test_the_configuration_names_heads_that_get_classifier_leaves_out():
    model = net("vit")
    model.aux_head = nn.Sequential(nn.Linear(16, 5))
    model.pretrained_cfg = {"classifier": ("head", "aux_head", "gone")}
    assert adapter_for(model).head == ("head", "aux_head")
    assert not any(name.startswith("aux_head") for name in adapter_for(model).layers())


@needs_timm
def test_blocks_that_no_name_gives_away_are_asked_for():
    model = net("vit")
    model.deep = model.blocks
    del model.blocks
    with pytest.raises(UnsupportedModelError, match="no list of blocks.*'deep'"):
        adapter_for(model).blocks()


@needs_timm
def test_parts_that_see_positions_instead_of_samples_are_left_alone():
    for family, part in (("swin_v2", "cpb_mlp"), ("maxvit", "rel_pos")):
        model = net(family)
        assert any(part in name.split(".") for name, _ in model.named_modules())
        for head in (None, ()):
            assert not any(part in name.split(".") for name in adapter_for(model, head).layers())


@needs_timm
def test_head_is_sliced_only_when_asked_for():
    assert "fc" in adapter_for(net("resnet"), ()).layers()
    assert "layer1.0.conv1" not in adapter_for(net("resnet"), ("layer1",)).layers()
    custom = ImageClassifier(net("resnet"), head=("fc", "layer4"))
    assert adapter_for(custom).head == ("body.fc", "body.layer4")


@needs_timm
def test_a_model_without_a_head_has_no_feature_layer_but_can_be_profiled():
    model = net("vit", labels=0)
    assert adapter_for(model).head == ()
    with pytest.raises(UnsupportedModelError, match="VisionTransformer has no classifier.*it has no head"):
        adapter_for(model).feature_layer()
    with pytest.raises(UnsupportedModelError, match="gives no logits"):
        ImageClassifier(model)
    assert profile_coverage(model, timm_nets.images(), progress=False).num_samples == 5


@needs_timm
def test_images_are_found_in_every_form_of_batch():
    model, images = net("resnet"), pixels()
    adapter = adapter_for(model)
    expected = model(images)
    labels = torch.zeros(3, dtype=torch.int64)
    for batch in (
        images,
        (images, labels),
        [images, labels],
        {"pixel_values": images, "labels": labels, "extra": labels},
        {"image": images, "label": labels},
    ):
        assert torch.equal(adapter.forward(batch), expected)
        assert adapter.sequences(batch) == {}
    # A text model's mask would be read as padding.
    assert adapter.sequences({"pixel_values": images, "attention_mask": torch.ones(3, 4)}) == {}


@needs_timm
@pytest.mark.parametrize(
    ("batch", "error", "words"),
    [
        ({"pixel_values": torch.zeros(2, 3, 32, 32, dtype=torch.uint8)}, TypeError, "tensor of torch.uint8"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.int64), TypeError, "Divide bytes by 255"),
        (torch.zeros(3, 32, 32), ValueError, r"got \(3, 32, 32\)"),
        ({"a": torch.zeros(1), "b": torch.zeros(1)}, TypeError, r"must hold `pixel_values`.*\['a', 'b'\]"),
        (({"no": "tensor"}, 1), TypeError, "got dict"),
    ],
)
def test_batches_without_proper_images_are_refused(batch, error, words):
    for model in (net("resnet"), ImageClassifier(net("resnet")), wrapper()):
        with pytest.raises(error, match=words):
            adapter_for(model).forward(batch)


@needs_timm
def test_hidden_states_are_refused_in_favour_of_hooks():
    with pytest.raises(UnsupportedModelError, match="ResNet is a model of timm.*source='hooks'"):
        profile_coverage(net("resnet"), timm_nets.images(), source="hidden_states", progress=False)


@needs_timm
@pytest.mark.parametrize("family", ["swin_v2", "beit"])
def test_biases_lie_in_qkv_only_while_the_model_runs(family):
    model = net(family)
    before, names = state(model), [name for name, _ in model.named_parameters()]
    assert torch.equal(adapter_for(model).forward(pixels()), model(pixels()))
    with pytest.raises(RuntimeError):
        adapter_for(model).forward(pixels()[:, :2])  # two channels
    assert same(state(model), before)
    assert [name for name, _ in model.named_parameters()] == names
    adapter_for(model).forward(pixels()).sum().backward()
    assert all(module.q_bias.grad is not None for module in model.modules() if hasattr(module, "q_bias"))


@needs_timm
def test_fresh_weights_are_spread_as_timm_starts_them():
    generator = torch.Generator().manual_seed(0)
    for family, name in (
        ("resnet", "layer1.0.conv2"),
        ("mobilenet_v2", "blocks.1.0.conv_dw"),
        ("vit", "blocks.0.mlp.fc1"),
    ):
        spreads = []
        for seed in range(20):
            torch.manual_seed(seed)
            spreads.append(getattr(timm_nets, family)().get_submodule(name).weight.std())
        adapter = adapter_for(net(family))
        fresh = [adapter.fresh_weight(adapter.layers()[name], generator) for _ in range(20)]
        assert fresh[0].shape == adapter.layers()[name].weight.shape
        found, expected = torch.stack([one.std() for one in fresh]).mean(), torch.stack(spreads).mean()
        assert found.item() == pytest.approx(expected.item(), rel=0.1), name


def plain(seed=0, **options):
    return ImageClassifier(tiny.ConvNet(seed), head=("head",), **options).eval()


def test_the_loss_is_cross_entropy_with_smoothing():
    images, labels = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 3, 0])
    for smoothing in (0.0, 0.1):
        model = plain(label_smoothing=smoothing)
        found = model(images, labels)
        assert torch.equal(found.logits, model.body(images))
        right = found.logits.log_softmax(1)[torch.arange(6), labels]
        expected = -((1 - smoothing) * right + smoothing * found.logits.log_softmax(1).mean(1)).mean()
        assert found.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert plain()(images).loss is None


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (torch.tensor([0, -100]), "from 0 to 3, the labels of the head, but got -100"),
        (torch.tensor([0, 4]), "but got 4"),
        (torch.tensor([0.0, 1.0]), r"int64, one for each of the 2 images, but got torch.float32"),
        (torch.tensor([0, 1, 2]), r"of shape \(3,\)"),
    ],
)
def test_labels_that_the_head_does_not_have_are_refused(labels, words):
    with pytest.raises(ValueError, match=words):
        plain()(torch.randn(2, 3, 8, 8), labels)


def test_whole_number_images_are_refused_before_they_run():
    with pytest.raises(TypeError, match="image_input_of"):
        plain()(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


def test_a_body_must_return_logits_and_name_its_head():
    class Pair(tiny.ConvNet):
        def forward(self, pixel_values):
            return super().forward(pixel_values), 0

    with pytest.raises(TypeError, match="Pair returned tuple"):
        ImageClassifier(Pair(), head=("head",))(torch.randn(2, 3, 8, 8))
    with pytest.raises(TypeError, match=r"returned \(2, 8, 8, 8\)"):
        ImageClassifier(tiny.ConvNet().stem, head=("",))(torch.randn(2, 3, 8, 8))
    with pytest.raises(UnsupportedModelError, match=r"(?s)ConvNet does not say.*'relu'.*'head'"):
        ImageClassifier(tiny.ConvNet())
    with pytest.raises(ValueError, match="fc"):
        ImageClassifier(tiny.ConvNet(), head=("fc",))
    with pytest.raises(UnsupportedModelError, match="ViTForImageClassification takes pixel_values and labels already"):
        ImageClassifier(tiny.vit())
    with pytest.raises(UnsupportedModelError, match="already"):
        ImageClassifier(plain())
    with pytest.raises(UnsupportedModelError, match="before it is wrapped"):
        ImageClassifier(nn.DataParallel(tiny.ConvNet()), head=("head",))
    with pytest.raises(ValueError, match=r"in \[0, 1\), but got 1"):
        plain(label_smoothing=1)


def test_an_adapter_sees_through_to_a_plain_body():
    adapter = adapter_for(plain())
    assert adapter.head == ("body.head",)
    assert adapter.feature_layer() == "body.head"
    bare = Adapter(tiny.ConvNet(), ("head",)).layers()
    assert list(adapter.layers()) == [f"body.{name}" for name in bare]
    assert "body.head" in adapter_for(plain(), ()).layers()


def test_profiles_of_a_body_and_of_the_classifier_around_it_are_the_same():
    model = tiny.ConvNet().eval()
    inner = profile_coverage(model, tiny.image_batches(), head=("head",), progress=False)
    outer = profile_coverage(ImageClassifier(model, ("head",)), tiny.image_batches(), progress=False)
    assert {f"body.{name}" for name in inner.output_counts} == set(outer.output_counts)
    assert all(torch.equal(counts, outer.output_counts[f"body.{n}"]) for n, counts in inner.output_counts.items())


TEACHERS = {
    "bare resnet": lambda: net("resnet"),
    "bare swin": lambda: net("swin"),
    "distilled": lambda: net("distilled_vit"),
    "wrapper": lambda: wrapper(),
    "classifier": lambda: ImageClassifier(net("mobilenet_v3"), label_smoothing=0.1).eval(),
}


def logits_of(model, images):
    found = model(images)
    return found if isinstance(found, torch.Tensor) else found.logits


def check_new_head(teacher, images):
    before, random_state = state(teacher), torch.random.get_rng_state()
    student = with_new_head(teacher, 3, seed=1)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    head = adapter_for(teacher).head
    after = state(student)
    assert type(student) is type(teacher)
    assert adapter_for(student).head == head
    modes = {name: module.training for name, module in teacher.named_modules()}
    assert all(module.training == modes.get(name, teacher.training) for name, module in student.named_modules())
    assert same(state(teacher), before)
    for name, tensor in before.items():
        if name.startswith(head):
            assert after[name].shape[0] == 3
            assert not torch.equal(after[name][:1], tensor[:1])
        else:  # also the statistics of BatchNorm
            assert torch.equal(after[name], tensor), name
    assert logits_of(student.eval(), images).shape == (len(images), 3)
    assert same(after, state(with_new_head(teacher, 3, seed=1)))
    assert not same(after, state(with_new_head(teacher, 3, seed=2)))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert same(state(teacher), before)
    with pytest.raises(ValueError, match="at least 1, but got 0"):
        with_new_head(teacher, 0, seed=1)
    return student


@needs_timm
@pytest.mark.parametrize("kind", TEACHERS)
def test_a_student_is_the_teachers_body_under_a_head_that_was_never_trained(kind):
    student = check_new_head(TEACHERS[kind](), pixels())
    if kind == "wrapper":
        assert student.config.num_labels == student.num_labels == 3
    if kind == "classifier":
        assert student.label_smoothing == 0.1


def test_a_student_of_a_plain_body_is_made_as_well():
    check_new_head(plain(), torch.randn(2, 3, 8, 8))


def test_every_module_of_a_plain_head_is_new_and_its_last_linear_gets_the_labels():
    body = nn.Sequential(
        nn.Flatten(), nn.Linear(48, 6), nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 4, False))
    )
    teacher = ImageClassifier(body, head=("2",))
    student = with_new_head(teacher, 2, seed=0)
    assert torch.equal(student.body[1].weight, body[1].weight)
    assert not torch.equal(student.body[2][0].weight, body[2][0].weight)
    assert student.body[2][2].weight.shape == (2, 7)
    assert student.body[2][2].bias is None


@needs_timm
def test_half_precision_and_the_training_mode_carry_over_to_a_new_head():
    for teacher in (net("resnet").bfloat16().train(), plain().bfloat16().train()):
        student = with_new_head(teacher, 3, seed=0)
        assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
        assert student.training


class InTimmsForm(tiny.ConvNet):
    """Somebody's model that answers as timm's do, without timm."""

    num_classes = 4

    def get_classifier(self):
        return self.head

    def reset_classifier(self, num_classes):
        self.num_classes, self.head = num_classes, nn.Linear(6, num_classes)


def test_a_model_in_timms_form_is_one_whoever_wrote_it():
    teacher = InTimmsForm().bfloat16().eval()
    adapter = adapter_for(ImageClassifier(teacher))
    assert isinstance(adapter, TimmAdapter)
    assert (adapter.head, adapter.feature_layer()) == (("body.head",), "body.head")
    student = with_new_head(teacher, 3, seed=0)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    assert not any(module.training for module in student.modules())
    check_new_head(InTimmsForm(), torch.randn(2, 3, 8, 8))


def test_a_module_that_does_not_say_what_its_head_is_gets_no_new_one():
    with pytest.raises(UnsupportedModelError, match=r"ConvNet does not say.*ImageClassifier\(module, head="):
        with_new_head(tiny.ConvNet(), 2, seed=0)


@needs_timm
def test_a_wrapper_of_features_takes_no_head():
    from transformers import TimmWrapperConfig, TimmWrapperModel

    config = TimmWrapperConfig(architecture="resnet18", model_args={"layers": (1,) * 4, "channels": (4,) * 4})
    model = TimmWrapperModel(config)
    assert adapter_for(model).head == ()
    assert profile_coverage(model, timm_nets.images(), progress=False).num_samples == 5
    with pytest.raises(UnsupportedModelError, match="returns features"):
        with_new_head(model, 3, seed=0)


@needs_timm
def test_the_labels_of_the_teacher_are_not_saved_with_a_wrapped_student(tmp_path):
    from transformers import AutoModelForImageClassification

    teacher = wrapper(labels=2)
    teacher.config.label_names = ["cat", "dog"]
    student = with_new_head(teacher, 3, seed=0).eval()
    assert teacher.config.label_names == ["cat", "dog"]
    student.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["label_names"] == ["LABEL_0", "LABEL_1", "LABEL_2"]
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert loaded.config.num_labels == 3
    assert torch.equal(loaded(pixels()).logits, student(pixels()).logits)


@needs_timm
def test_a_module_is_taken_as_it_is_unless_it_needs_another_head():
    model = net("resnet")
    assert image_classifier(model).body is model
    assert image_classifier(model, timm_nets.LABELS).body is model
    other = image_classifier(model, 2)
    assert other.body is not model
    assert (other.body.num_classes, model.num_classes) == (2, timm_nets.LABELS)
    classifier = plain()
    assert image_classifier(classifier) is classifier
    assert image_classifier(classifier, 4) is classifier
    assert image_classifier(classifier, 2).body.head.out_features == 2
    headless = net("vit", labels=0)
    assert image_classifier(headless, 2)(pixels()).logits.shape == (3, 2)
    with pytest.raises(UnsupportedModelError, match="gives no logits"):
        image_classifier(headless)
    with pytest.raises(UnsupportedModelError, match="does not say which modules are its head"):
        image_classifier(tiny.ConvNet())
    with pytest.raises(ValueError, match="Load a module's weights"):
        image_classifier(model, checkpoint_path="x.safetensors")
    with pytest.raises(ValueError, match="at least 1, but got 0"):
        image_classifier("test_resnet", 0)


def rows(count=8):
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(count, 3, timm_nets.PIXELS, timm_nets.PIXELS, generator=generator)
    return [{"pixel_values": image, "labels": number % 3} for number, image in enumerate(pixels)]


def train(model, folder):
    options = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 2, "learning_rate": 1e-2}
    arguments = TrainingArguments(str(folder), per_device_train_batch_size=4, save_strategy="no", **options)
    trainer = RemosTrainer(model, arguments, slice_ratio=0.8, train_dataset=rows())
    trainer.train()
    trainer.save_model()
    return trainer


@needs_timm
def test_a_classifier_is_sliced_trained_saved_and_loaded_as_a_plain_model_of_timm(tmp_path):
    teacher = image_classifier("test_resnet", 3, pretrained=False)
    student = copy.deepcopy(teacher)
    trainer = train(student, tmp_path)
    assert all(name.startswith("body.") and ".fc." not in name for name in trainer.relevant_slice.kept)
    assert {"model.safetensors", "remos_slice.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    images, expected = pixels(), student.eval()(pixels()).logits
    assert not torch.equal(expected, teacher.eval()(images).logits)

    import timm

    bare = timm.create_model("test_resnet", num_classes=3).eval()
    saved = load_file(tmp_path / "model.safetensors")
    bare.load_state_dict({name.removeprefix("body."): tensor for name, tensor in saved.items()})
    assert torch.equal(bare(images), expected)
    again = image_classifier("test_resnet", checkpoint_path=tmp_path / "model.safetensors").eval()
    assert torch.equal(again(images).logits, expected)
    empty = ImageClassifier(timm.create_model("test_resnet", num_classes=3)).eval()
    load_model(empty, tmp_path / "model.safetensors")
    assert torch.equal(empty(images).logits, expected)


@needs_timm
def test_a_wrapper_is_sliced_trained_saved_and_loaded_without_us(tmp_path):
    from transformers import AutoModelForImageClassification

    student = with_new_head(wrapper(), 3, seed=0)
    trainer = train(student, tmp_path)
    assert trainer.relevant_slice.num_kept < trainer.relevant_slice.num_weights
    assert "timm_model.fc.weight" not in trainer.relevant_slice.kept
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(pixels()).logits, student.eval()(pixels()).logits)


def test_a_plain_body_is_trained_and_loaded_again(tmp_path):
    student = plain()
    train(student, tmp_path)
    again = plain(seed=1)
    load_model(again, tmp_path / "model.safetensors")
    assert torch.equal(again(pixels()).logits, student.eval()(pixels()).logits)


@needs_timm
def test_a_wrapped_model_of_timm_answers_for_the_model_inside():
    model = wrapper()
    adapter = adapter_for(model)
    assert isinstance(adapter, TimmAdapter)
    assert adapter.head == ("timm_model.fc",)
    assert adapter.feature_layer() == "timm_model.fc"
    assert list(adapter.blocks()) == [f"timm_model.layer{i}" for i in range(1, 5)]
    inner = profile_coverage(model.timm_model, timm_nets.images(), progress=False)
    outer = profile_coverage(model, timm_nets.images(), progress=False)
    assert all(torch.equal(counts, outer.input_counts[f"timm_model.{n}"]) for n, counts in inner.input_counts.items())


@pytest.mark.timm
@pytest.mark.parametrize("make", [timm_nets.swin, timm_nets.swin_v2, lambda: ImageClassifier(timm_nets.swin())])
def test_maps_of_a_model_that_gives_them_with_channels_last_have_their_channels_there(make):
    model = make().eval()
    adapter, modules = adapter_for(model), dict(model.named_modules())
    with capture(modules) as made, torch.no_grad():
        adapter.forward(torch.randn(2, 3, timm_nets.PIXELS, timm_nets.PIXELS))
    maps = {name: one for name, one in made.items() if one.dim() == 4 and name in adapter.blocks()}
    widths = {name: one.shape[adapter.channel_axis(name, one)] for name, one in maps.items()}
    assert list(widths.values()) == [8, 16]
    convolution = next(name for name, one in modules.items() if isinstance(one, nn.Conv2d))
    assert adapter.channel_axis(convolution, made[convolution]) == 1


def test_maps_have_their_channels_last_behind_a_linear_or_a_layer_norm_and_second_behind_all_else():
    model = nn.ModuleDict({"linear": nn.Linear(3, 3), "norm": nn.LayerNorm(3), "conv": nn.Conv2d(3, 3, 1)})
    axes = {name: adapter_for(model, ()).channel_axis(name, torch.zeros(2, 3, 3, 3)) for name in model}
    assert axes == {"linear": 3, "norm": 3, "conv": 1}
    assert adapter_for(model, ()).channel_axis("conv", torch.zeros(2, 3, 3)) == 2
