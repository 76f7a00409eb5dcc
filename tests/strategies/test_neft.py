import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from remos_hf.adapters.timm_models import ImageClassifier
from remos_hf.errors import UnsupportedModelError
from remos_hf.strategies.neft import Neft
from remos_hf.strategies.operator_norm import all_computed
from tests import tiny
from tests.strategies.residual_nets import Net, Post, Pre
from tests.strategies.test_attacked_inputs import images
from tests.training.runs import trainer

HEAD = {"head": ("head",)}
pytestmark = pytest.mark.filterwarnings("ignore:Right behind:UserWarning")


def data():
    return tiny.student_data(lambda: [images()])


def started(recipe, model):
    done = recipe.prepare(model, data())
    return done, recipe.hold(model, copy.deepcopy(model))


def steps(model, hold, count=3, rate=0.1):
    """Train as a Trainer does; each step calls train()."""
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], rate)
    values, labels = images()
    for _ in range(count):
        model.train()
        optimizer.zero_grad()
        loss, _ = hold.loss(
            model, (values, labels), lambda given: (nn.functional.cross_entropy(model(given[0]), labels), None)
        )  # noqa: E501
        loss.backward()
        optimizer.step()
        hold.after_step(model)


def kernel_norm(weight):
    return torch.linalg.matrix_norm(weight.detach().flatten(1), 2).item()


def test_the_extractor_stays_and_the_last_units_train():
    model = Net(Post)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    _, hold = started(Neft(2, **HEAD), model)
    steps(model, hold)
    hold.finish(model, None)
    moved = {name for name, one in model.state_dict().items() if not torch.equal(one, before[name])}
    assert all(name.startswith(("layer2.1.", "head.")) for name in moved)
    assert {"head.weight", "layer2.1.conv1.weight", "layer2.1.bn2.bias"} <= moved
    assert all(one.requires_grad for one in model.parameters())


@pytest.mark.parametrize("options", [{}, {"images": (8, 8)}], ids=["kernel", "operator"])
def test_baked_layers_have_at_most_the_norm_beta_and_the_student_is_a_plain_model(options):
    model = Net(Post)
    _, hold = started(Neft(3, beta=0.4, **options, **HEAD), model)
    steps(model, hold)
    for each in all_computed(model).values():
        each[0].settle(each.original.detach())
    trained = model.eval()(images()[0])
    hold.finish(model, None)
    assert model.state_dict().keys() == Net(Post).state_dict().keys() and type(model.head) is nn.Linear
    assert torch.allclose(model(images()[0]), trained, atol=1e-5)
    layers = [model.layer2[0].conv1, model.layer2[0].downsample[0], model.layer2[1].conv2, model.head]
    if not options:
        assert all(kernel_norm(layer.weight) <= 0.4 * (1 + 1e-3) for layer in layers)
        return
    for layer, size in zip(layers[:3], ((6, 8, 8), (6, 8, 8), (8, 4, 4)), strict=True):
        units = torch.eye(int(torch.tensor(size).prod())).view(-1, *size)
        assert torch.linalg.matrix_norm(layer(units).flatten(1), 2).item() <= 0.4 * (1 + 1e-3)


def test_without_beta_it_is_the_plain_transfer_of_the_last_units():
    model = Net(Post)
    done, hold = started(Neft(2, beta=None, **HEAD), model)
    assert not all_computed(model) and done.details["neft"]["bounded"] == []
    assert not model.layer2[0].conv1.weight.requires_grad and model.layer2[1].conv1.weight.requires_grad
    steps(model, hold, 1)
    hold.finish(model, None)


@pytest.mark.parametrize("extractor", ["reuse", "update"])
@pytest.mark.parametrize("submodel", ["reuse", "update"])
def test_statistics_follow_their_policy_although_evaluation_flips_all_modes(extractor, submodel):
    model = Net(Post)
    _, hold = started(Neft(2, extractor_statistics=extractor, submodel_statistics=submodel, **HEAD), model)
    before = {name: one.clone() for name, one in model.named_buffers() if name.endswith("running_mean")}
    for _ in range(2):
        steps(model, hold, 1)
        model.eval()(images()[0])
        model.train()
    moved = {name: not torch.equal(one, before[name]) for name, one in model.named_buffers() if name in before}
    assert all(flag == (submodel == "update") for name, flag in moved.items() if name.startswith("layer2.1"))
    assert all(flag == (extractor == "update") for name, flag in moved.items() if not name.startswith("layer2.1"))


@pytest.mark.parametrize("extractor", ["freeze", "tune"])
@pytest.mark.parametrize("submodel", ["freeze", "tune"])
def test_weight_and_bias_of_norms_follow_theirs(extractor, submodel):
    model = Net(Post)
    started(Neft(2, extractor_affine=extractor, submodel_affine=submodel, **HEAD), model)
    for name, one in model.named_parameters():
        behind = name.startswith(("layer2.1", "head"))
        is_norm = ".bn" in name or "downsample.1" in name
        wanted = (submodel if behind else extractor) == "tune" if is_norm else behind
        assert one.requires_grad == wanted, name


def test_layer_norms_have_only_the_half_of_weight_and_bias():
    model = tiny.bert()
    Neft(2, submodel_affine="freeze").hold(model, model)
    assert not model.bert.encoder.layer[1].output.LayerNorm.weight.requires_grad
    assert model.classifier.bias.requires_grad
    with pytest.raises(UnsupportedModelError, match="extractor_statistics is about .* batch norms"):
        Neft(2, extractor_statistics="reuse").hold(tiny.bert(), model)


def test_the_rms_norms_that_libraries_write_themselves_are_norms():
    model = tiny.llama()
    Neft(2, extractor_affine="tune", submodel_affine="freeze").hold(model, model)
    assert model.model.layers[0].input_layernorm.weight.requires_grad
    assert not model.model.layers[0].mlp.up_proj.weight.requires_grad
    assert not model.model.norm.weight.requires_grad and model.lm_head.weight.requires_grad


def test_each_step_follows_the_weights_and_the_end_settles_them():
    model = Net(Post)
    _, hold = started(Neft(2, **HEAD), model)
    norm, given = model.head.parametrizations.weight[0], []
    with torch.no_grad():
        model.head.parametrizations.weight.original[0] += 1
        given.append(norm.given.clone())
    steps(model, hold, 1, rate=0.0)
    assert not torch.equal(norm.given, given[0]) and kernel_norm(model.head.weight) != pytest.approx(0.4, rel=1e-6)
    hold.finish(model, None)
    assert kernel_norm(model.head.weight) == pytest.approx(0.4, rel=1e-5)


def test_the_heads_start_goes_by_the_seed():
    heads = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(heads))
        model = Net(Post)
        Neft(2, head_start="uniform", seed=seed, **HEAD).prepare(model, data())
        heads.append(model.head.weight.detach())
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_where_a_norm_takes_beta_out_again_it_is_told_and_so_it_is():
    with pytest.warns(UserWarning, match="Right behind 5 of the 6 layers .*'layer2.0.conv1'"):
        done = Neft(3, submodel_statistics="update", **HEAD).prepare(Net(Post), tiny.student_data(lambda: [images()]))
    told = done.details["neft"]
    assert "head" in told["bounded"] and "head" not in told["beta_cancelled"]
    outputs = []
    for beta in (1.0, 0.4):
        block = Net(Post)
        Neft(3, beta=beta, **HEAD).hold(block, block)
        outputs.append(block.train().layer2(torch.rand(4, 6, 8, 8, generator=torch.Generator().manual_seed(1))))
    assert torch.allclose(*outputs, atol=0.02)
    assert not Neft(3, submodel_statistics="reuse", **HEAD).prepare(Net(Post), data()).details["neft"]["beta_cancelled"]


def test_layers_whose_output_is_added_before_a_norm_are_not_among_them():
    told = Neft(3, **HEAD).prepare(Net(Pre), data()).details["neft"]
    assert told["beta_cancelled"] == ["layer2.1.conv1"] and told["trained_units"] == [["layer2.1"], ["norm"], ["head"]]
    assert Neft(2).prepare(tiny.bert(), tiny.student_data()).details["neft"]["beta_cancelled"] == []


@pytest.mark.parametrize("block", [Post, Pre], ids=lambda block: block.__name__)
def test_the_published_student_trains_and_comes_out_plain(block):
    model = Net(block)
    done, hold = started(Neft.artifact(4, **HEAD), model)
    assert (model.head.weight >= 0).all() and (model.head.bias >= 0).all()
    steps(model, hold)
    trained = model.eval()(images()[0])
    hold.finish(model, None)
    assert torch.allclose(model(images()[0]), trained, atol=1e-3)
    assert model.state_dict().keys() == Net(block).state_dict().keys()
    assert done.details["neft"]["mixed_blocks"][-1] == "layer2.1"
    assert set(hold.details()["neft"]["sigmas_before_bounding"]) == set(done.details["neft"]["bounded"])


@pytest.mark.parametrize(
    "options", [{}, {"beta": None}, {"beta": None, "mix": True}], ids=["bounded", "plain", "mixed"]
)
def test_a_finished_student_is_not_trained_on_and_stays_as_it_is(options):
    model = Net(Post)
    _, hold = started(Neft(3, **options, **HEAD), model)
    steps(model, hold)
    hold.finish(model, None)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    with pytest.raises(ValueError, match="student of Neft is finished.* start a new run"):
        steps(model, hold)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_a_trainer_that_has_finished_refuses_to_train_on_before_a_step(tmp_path):
    ours = trainer(tmp_path, strategy=Neft(2))
    ours.train()
    with pytest.raises(ValueError, match="student of Neft is finished"):
        ours.train()


def test_every_checkpoint_is_a_plain_model_and_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    rows = [{"pixel_values": one, "labels": int(label)} for one, label in zip(*images(), strict=True)]

    def run(resume=None):
        recipe = Neft.artifact(3, head=("body.head",), submodel_affine="tune")
        student = ImageClassifier(Net(Pre), head=("head",))
        options = {"data_collator": None, "train_dataset": rows, "model": student, "strategy": recipe}
        ours = trainer(tmp_path, **options, options={"eval_strategy": "steps", "eval_steps": 1})
        ours.eval_dataset = rows
        ours.train(resume_from_checkpoint=resume)
        return ours.model.state_dict()

    whole = run()
    resumed = run(str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(one, resumed[name]) for name, one in whole.items())
    fresh = ImageClassifier(Net(Pre, seed=9), head=("head",))
    kept = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    fresh.load_state_dict(kept)
    assert kept.keys() == whole.keys() == fresh.state_dict().keys()


def test_a_student_of_16_bits_trains():
    model = Net(Post).to(torch.bfloat16)
    hold = Neft(3, **HEAD).hold(model, model)
    values, _ = images()
    loss, _ = hold.loss(model.train(), None, lambda _: (model(values.bfloat16()).float().square().mean(), None))
    loss.backward()
    hold.finish(model, None)
    assert model.head.weight.dtype == torch.bfloat16 and all(one.isfinite().all() for one in model.parameters())


def test_a_weight_that_is_tied_is_left_out_and_told_once(caplog):
    model = Net(Post)
    model.layer2[1].conv2.weight = model.layer2[1].conv1.weight
    recipe = Neft(2, **HEAD)
    told = recipe.prepare(model, data()).details["neft"]
    recipe.hold(model, model)
    assert told["bounded"] == ["head"] and told["not_bounded"] == ["layer2.1.conv1", "layer2.1.conv2"]
    (warned,) = [one.message for one in caplog.records if "unbounded" in one.message]
    assert warned.endswith("the last 2 units train unbounded: layer2.1.conv1, layer2.1.conv2.")


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 8, batch_first=True) for _ in range(2)])
        self.head = nn.Linear(8, 4)

    def forward(self, pixel_values):
        hidden = pixel_values.mean(2)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden.mean(1))


def test_a_packed_weight_is_left_out_and_told_and_nothing_is_where_nothing_is_bounded(caplog):
    told = Neft(2, **HEAD).prepare(Packed(), data()).details["neft"]
    assert told["not_bounded"] == ["blocks.1.self_attn.in_proj_weight"] and "blocks.1.linear1" in told["bounded"]
    assert "train unbounded: blocks.1.self_attn.in_proj_weight." in caplog.text
    caplog.clear()
    assert not Neft(2, beta=None, **HEAD).prepare(Packed(), data()).details["neft"]["not_bounded"]
    assert "unbounded" not in caplog.text


@pytest.mark.parametrize("beta", [0.4, None])
def test_a_head_tied_to_the_frozen_embeddings_is_refused_with_what_to_do(beta):
    config = GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    model, recipe = GPT2LMHeadModel(config), Neft(2, beta=beta)
    with pytest.raises(UnsupportedModelError, match="'lm_head.weight' .* tied to 'transformer.wte.weight' .*") as told:
        recipe.prepare(model, tiny.student_data())
    model.config.tie_word_embeddings = False
    exec(str(told.value).rpartition("and ")[2].rstrip("."), {"model": model, "nn": nn})
    recipe.prepare(model, tiny.student_data())
    recipe.hold(model, model)
    trained = {name.partition(".")[0] for name, one in model.named_parameters() if one.requires_grad}
    assert trained == {"lm_head", "transformer"} and not model.transformer.wte.weight.requires_grad


def test_the_best_checkpoint_comes_back_with_its_norms_settled(tmp_path):
    rows = [{"pixel_values": one, "labels": int(label)} for one, label in zip(*images(), strict=True)]
    student = ImageClassifier(Net(Pre), head=("head",))
    best = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 3, "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss", "greater_is_better": True, "learning_rate": 0.1}  # fmt: skip
    ours = trainer(tmp_path, model=student, strategy=Neft(3, head=("body.head",)), data_collator=None,
                   train_dataset=rows, options=best)  # fmt: skip
    ours.eval_dataset = rows
    ours.train()
    number = ours.state.best_global_step
    saved = load_file(tmp_path / f"checkpoint-{number}" / "model.safetensors")
    assert number < 3  # the loss falls: the worst is asked for, so that it is not the last
    for name, one in ours.model.state_dict().items():  # up to their norm, which the end settles
        one, other = (nn.functional.normalize(each.double().flatten(), dim=0) for each in (one, saved[name]))
        assert torch.allclose(one, other, atol=1e-5), name
    assert kernel_norm(ours.model.body.head.weight) == pytest.approx(0.4, rel=1e-4)


@pytest.mark.parametrize("options", [
    {"beta": 0}, {"beta": 1.1}, {"k": 0}, {"head_start": "zero"}, {"submodel_statistics": "freeze"},
    {"extractor_affine": "reuse"}, {"images": (8,)},
])  # fmt: skip
def test_values_that_no_run_could_use_are_refused(options):
    with pytest.raises(ValueError, match="but got"):
        Neft(**{"k": 2, **options})


def test_a_model_may_be_run_twice_before_going_backward():
    model, batch = Net(Post), images()
    hold = Neft(2, **HEAD).hold(model, model)

    def run(given):
        return nn.functional.cross_entropy(model(given[0]), given[1]), None

    sum(hold.loss(model.train(), batch, run)[0] for _ in range(2)).backward()
    assert model.head.parametrizations.weight.original.grad.isfinite().all()


def test_a_weight_without_a_direction_is_refused_unless_it_is_drawn_anew():
    model = Net(Post)
    nn.init.zeros_(model.head.weight)
    with pytest.raises(ValueError, match=r"\['head'\] are all 0"):
        Neft(2, **HEAD).prepare(model, data())
    Neft(2, head_start="uniform", **HEAD).prepare(model, data())


def test_no_sample_at_all_is_refused():
    with pytest.raises(ValueError, match="no sample to start"):
        Neft(2, **HEAD).prepare(Net(Post), tiny.student_data(lambda: []))


def test_a_mix_of_unknown_blocks_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match=r"'bert.encoder.layer.1' is a BertLayer"):
        Neft(2, mix=True).prepare(tiny.bert(), tiny.student_data())
    with pytest.raises(UnsupportedModelError, match="None of the last 1 units is a residual block"):
        Neft(1, mix=True, **HEAD).prepare(Net(Post), data())


@pytest.mark.parametrize("images", [32, (32,), (0, -3), (True, 32), (32.0, 32), "ab"])
def test_images_are_two_whole_numbers_of_pixels(images):
    with pytest.raises(ValueError, match="images is a height and a width in pixels"):
        Neft(images=images)
    assert Neft(images=[np.int64(8), 9]).to_dict()["images"] == (8, 9)
