import copy
import json
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.nn import functional
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import UnsupportedModelError
from remos_hf.strategies.adversarial_training import AdversarialTraining
from remos_hf.strategies.composed import Composed
from remos_hf.strategies.guided import Guided
from tests import tiny
from tests.strategies.residual_nets import Net
from tests.strategies.test_attacked_inputs import MEAN, STD, images
from tests.training.runs import trainer

IMAGES = {"mean": MEAN, "std": STD, "head": ("head",), "eps": 0.1, "step": 0.03, "steps": 2}


def held(recipe, model):
    return recipe.hold(model, copy.deepcopy(model).requires_grad_(False).eval())


def image_run(model, seen):
    def run(batch):
        seen.append(batch[0])
        logits = model(batch[0])
        return functional.cross_entropy(logits, batch[1]), logits

    return run


def test_published_presets_carry_weight_and_reduction():
    paper, artifact = AdversarialTraining.paper(6), AdversarialTraining.artifact(6, eps=0.1)
    assert (paper.weight, paper.reduction, artifact.weight, artifact.reduction) == (0.005, "mean", 0.005, "sum")
    assert artifact.eps == 0.1 and AdversarialTraining().weight == pytest.approx(128 * artifact.weight)


def test_its_loss_is_the_attacked_loss_plus_the_distance_of_what_the_last_units_read():
    model, (values, labels) = Net(), images()
    hold = held(AdversarialTraining(k=2, weight=3.0, reduction="sum", **IMAGES), model)
    seen = []
    loss, outputs = hold.loss(model, (values, labels), image_run(model, seen))
    assert len(seen) == 1 and not torch.equal(seen[0], values) and not hold.clean.any()

    def feature(given):  # k = 2: the head and the last block, which reads what layer2.0 made
        return model.layer2[0](model.layer1(model.stem(given)))

    distances = (feature(seen[0]) - feature(values)).flatten(1).norm(dim=1) / math.sqrt(8 * 4 * 4)
    expected = functional.cross_entropy(model(seen[0]), labels) + 3 * distances.sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(outputs, model(seen[0]))
    told = hold.details()["adversarial_training"]
    assert told["cut_before"] == ["layer2.1"] and told["mean_distance"] == pytest.approx(distances.sum().item(), 1e-5)


def test_its_loss_on_texts_compares_real_tokens():
    model, batch = tiny.bert(), tiny.text_batches(1)[0]
    hold = held(AdversarialTraining(k=2, weight=2.0, steps=2, text_eps=0.5), model)
    inside = []

    def run(given):
        outputs = model(**given, output_hidden_states=True)
        inside.append((outputs.loss, outputs.hidden_states[1]))
        return outputs.loss, outputs

    loss, _ = hold.loss(model, batch, run)
    clean = model(**batch, output_hidden_states=True).hidden_states[1]
    attacked_loss, hit = inside[0]
    hit = torch.where(batch["attention_mask"].bool()[..., None], hit, torch.inf)  # padding is never looked at
    distances = [
        (one[mask] - two[mask]).norm() / math.sqrt(mask.sum() * 16)
        for one, two, mask in zip(hit, clean, batch["attention_mask"].bool(), strict=True)
    ]
    expected = attacked_loss + 2 * torch.stack(distances).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and distances[0] > 0


def test_both_passes_drop_the_same_so_that_dropout_is_no_distance():
    model, batch = tiny.bert().train(), tiny.text_batches(1)[0]
    for layer in (one for one in model.modules() if isinstance(one, nn.Dropout)):
        layer.p = 0.5
    hold = held(AdversarialTraining(k=2, steps=1, text_eps=1e-6), model)
    outputs = [hold.loss(model, batch, lambda given: (model(**given).loss, model(**given).logits))[1] for _ in range(2)]
    assert hold.details()["adversarial_training"]["mean_distance"] < 1e-4
    assert not torch.allclose(*outputs)  # the next step drops otherwise


def test_a_unit_that_reads_no_feature_of_the_samples_is_refused():
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "position_buckets": 8}
    config = DebertaV2Config(
        hidden_size=16, vocab_size=99, **sizes, relative_attention=True, norm_rel_ebd="layer_norm", pos_att_type=["p2c"]
    )
    model = DebertaV2ForSequenceClassification(config)
    batch = {key: one[:, :5] % 99 if one.dim() == 2 else one for key, one in tiny.text_batches(1)[0].items()}
    # The norm of its table of relative positions stands behind the blocks, by its place in the module alone.
    with pytest.raises(UnsupportedModelError, match=r"'deberta.encoder.LayerNorm' reads.* shape .* units="):
        held(AdversarialTraining(k=2, steps=1), model).loss(model, batch, lambda given: (model(**given).loss, None))
    units = ("deberta.encoder.layer.0", "deberta.encoder.layer.1", "classifier")
    hold = held(AdversarialTraining(k=2, steps=1, units=units), model)
    assert hold.loss(model, batch, lambda given: (model(**given).loss, None))[0].isfinite()


def test_with_adapters_every_pass_runs_in_the_trainers_precision(tmp_path):
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=2)
    options = {"save_strategy": "no", "bf16": True, "use_cpu": True, "max_steps": 1}
    ours = trainer(tmp_path, strategy=AdversarialTraining(k=2, steps=1), peft_config=config, options=options)
    seen = []

    def see(layer, _, made):
        seen.append((layer.training, made.dtype))

    ours.model.bert.encoder.layer[0].intermediate.dense.register_forward_hook(see)
    ours.train()
    # The first pass is that of `prepare`, which looks at the order of the units.
    assert seen == [(False, torch.float32), *((training, torch.bfloat16) for training in (False, True, True))]


def test_without_k_it_is_plain_adversarial_training():
    model, (values, labels) = Net(), images()
    seen = []
    loss, _ = held(AdversarialTraining(**IMAGES), model).loss(model, (values, labels), image_run(model, seen))
    assert loss.item() == pytest.approx(functional.cross_entropy(model(seen[0]), labels).item())


def test_both_passes_are_seen_by_batch_norms_and_the_search_by_none():
    model, batch = Net().train(), images()
    held(AdversarialTraining(k=1, **IMAGES), model).loss(model, batch, image_run(model, []))
    assert int(model.layer1[0].bn1.num_batches_tracked) == 2 and model.training


def test_it_makes_a_model_robust_that_plain_training_leaves_open():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(32) % 2
    pixels = 0.5 + 0.02 * torch.randn(32, 3, 8, 8, generator=generator)
    pixels[:, :, 4:] += 0.2 * (labels * 2 - 1)[:, None, None, None]
    values = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]

    def trained(recipe):
        model = Net()
        hold, optimizer = held(recipe, model), torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(15):
            optimizer.zero_grad()
            hold.loss(model.train(), (values, labels), image_run(model, []))[0].backward()
            optimizer.step()
            hold.after_step(model)
        return model.eval()

    attack = held(AdversarialTraining(**{**IMAGES, "eps": 0.15, "step": 0.05, "steps": 5}), Net())

    def robust(model):
        seen = []
        attack.loss(model, (values, labels), image_run(model, seen))
        return (model(seen[0]).argmax(1) == labels).float().mean()

    recipe = AdversarialTraining(k=1, **{**IMAGES, "eps": 0.15, "step": 0.06})
    never = AdversarialTraining(eps_from=1000, eps_full=1000, **IMAGES)
    assert robust(trained(recipe)) > robust(trained(never)) + 0.2


def test_eps_grows_in_a_line_between_two_steps_and_goes_on_after_resuming():
    model, (values, labels) = Net(), images()
    hold, sizes = held(AdversarialTraining(eps_from=1, eps_full=3, **IMAGES), model), []
    for _ in range(5):
        seen = []
        hold.loss(model, (values, labels), image_run(model, seen))
        sizes.append(((seen[0] - values) * torch.tensor(STD)[:, None, None]).abs().max().item())
        hold.after_step(model)
    assert sizes[:2] == [0, 0]
    assert sizes[2] == pytest.approx(0.05, abs=1e-3) and sizes[3] == pytest.approx(0.1, abs=1e-3)
    other = held(AdversarialTraining(eps_from=1, eps_full=3, **IMAGES), model)
    other.load_state_dict(hold.state_dict())
    assert other._share() == 1 and torch.equal(other.generator.get_state(), hold.generator.get_state())


def test_roli_trains_the_head_alone_on_attacked_inputs_before():
    model = tiny.bert()
    before = {name: one.clone() for name, one in model.named_parameters()}
    done = AdversarialTraining(head_steps=3, steps=1).prepare(model, tiny.student_data())
    moved = {name for name, one in model.named_parameters() if not torch.equal(one, before[name])}
    assert moved and all(name.startswith(("classifier", "bert.pooler")) for name in moved)
    assert done.details["roli"]["head_steps"] == 3 and all(one.requires_grad for one in model.parameters())
    with pytest.raises(ValueError, match="give head="):
        AdversarialTraining(head_steps=1).prepare(Net(), tiny.student_data(tiny.image_batches))


def test_beside_other_perturbations_no_sample_counts_as_clean():
    model = tiny.bert()
    hold = Composed((Guided(seed=0), AdversarialTraining(steps=1))).hold(model, copy.deepcopy(model))
    batch = tiny.text_batches(1)[0]
    hold.loss(model, batch, lambda given: (model(**given).loss, None))
    assert not any(one.clean.all() for one in hold.holds)


def test_gradient_checkpointing_is_refused_where_features_are_read():
    model = tiny.bert()
    hold = held(AdversarialTraining(k=2), model)
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="Train without gradient_checkpointing"):
        hold.loss(model, tiny.text_batches(1)[0], None)


@pytest.mark.parametrize("options", [
    {"eps": 0}, {"eps": 8}, {"step": 0}, {"steps": 0}, {"weight": -1}, {"reduction": "max"}, {"k": 0},
    {"eps_from": 5}, {"eps_from": 5, "eps_full": 4}, {"mean": (0.5,)}, {"mean": (0.5,), "std": (1, 1)},
])  # fmt: skip
def test_values_that_no_run_could_use_are_refused(options):
    with pytest.raises(ValueError, match="but got|but pixels|not before"):
        AdversarialTraining(**options)


def test_more_units_than_there_are_is_refused_before_training():
    with pytest.raises(ValueError, match="from 1 to 3"):
        held(AdversarialTraining(k=4), tiny.bert())
    assert adapter_for(tiny.bert()).head


@pytest.mark.parametrize(
    "normalised", [(0.5, 0.5), ("abc", "abc"), ((0.5,), (0,)), ((0.5,), (True,)), ((0, 0), (1, -1))]
)
def test_a_normalisation_that_no_image_has_is_refused(normalised):
    with pytest.raises(ValueError, match="one number a channel"):
        AdversarialTraining(**dict(zip(("mean", "std"), normalised, strict=True)))
    taken = AdversarialTraining(mean=np.array([0.5, 0.0]), std=[np.float32(0.5), 1])
    assert json.loads(json.dumps(taken.to_dict()))["std"] == [0.5, 1] and taken.mean == (0.5, 0.0)
