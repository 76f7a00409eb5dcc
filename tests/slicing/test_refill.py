import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import LayerMismatchError, NonFiniteError, TeacherMismatchError, UnsupportedModelError
from remos_hf.slicing.refill import RIDGE, reset_outside, reset_unseen_rows, squares_outside
from remos_hf.slicing.relevant_slice import choose_slice
from tests import tiny


@pytest.fixture
def teacher():
    return tiny.bert()


@pytest.fixture
def relevant(teacher):
    return choose_slice(teacher, slice_ratio=0.7, rule="random")


@pytest.mark.parametrize("to", ["zero", "init"])
def test_kept_weights_stay_bit_for_bit_and_the_others_go(teacher, relevant, to):
    student = reset_outside(copy.deepcopy(teacher), relevant, to=to)
    theirs = dict(teacher.named_parameters())
    for name, ours in student.named_parameters():
        if name not in relevant.kept:
            assert torch.equal(ours, theirs[name])
            continue
        kept = relevant.kept[name]
        assert torch.equal(ours[kept], theirs[name][kept])
        if to == "zero":
            assert not ours[~kept].any()
        else:
            assert not torch.isclose(ours[~kept], theirs[name][~kept]).any()
            assert ours[~kept].std().item() == pytest.approx(teacher.config.initializer_range, rel=0.3)


def test_fresh_values_depend_on_the_seed_alone(teacher, relevant):
    def reset(seed):
        torch.randn(3)  # the global state must not matter
        return reset_outside(copy.deepcopy(teacher), relevant, to="init", seed=seed).state_dict()

    one, same, other = reset(1), reset(1), reset(2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_reset_weights_train_again(teacher, relevant):
    student = reset_outside(teacher, relevant)
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    student(**tiny.text_batches(1)[0]).loss.backward()
    optimizer.step()
    name = next(iter(relevant.kept))
    reset = dict(student.named_parameters())[name][~relevant.kept[name]]
    assert (reset != 0).float().mean() > 0.9


def test_a_new_head_is_no_other_teacher(teacher, relevant):
    with torch.no_grad():
        teacher.classifier.weight.normal_()
    reset_outside(teacher, relevant)


@pytest.mark.parametrize("make", [lambda: tiny.bert(seed=1), lambda: tiny.bert().bfloat16()])
def test_another_teacher_is_refused_before_anything_is_written(relevant, make):
    other = make()
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(TeacherMismatchError):
        reset_outside(other, relevant)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    reset_outside(other, relevant, verify_teacher=False)


def test_another_architecture_is_refused_even_unverified(relevant):
    with pytest.raises(LayerMismatchError):
        reset_outside(tiny.gpt2(), relevant, verify_teacher=False)


def test_an_unknown_way_to_reset_is_refused(teacher, relevant):
    with pytest.raises(ValueError, match="one of 'zero', 'init', 'mean', 'reconstruct', but got 'one'"):
        reset_outside(teacher, relevant, to="one")


class Fused(nn.Module):
    """Layers of every orientation, all with biases, among them packed attention and stacked experts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 5)
        self.turned = Conv1D(5, 6)
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.attention = nn.MultiheadAttention(4, 2)
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.randn(3, 4, 10))
        self.experts.gate_up_proj_bias = nn.Parameter(torch.randn(3, 10))
        self.experts.down_proj = nn.Parameter(torch.randn(3, 5, 4))
        self.experts.down_proj_bias = nn.Parameter(torch.randn(3, 4))


def layers_of(model):
    return adapter_for(model, ()).layers()


def outputs(layer, columns):
    """What a layer makes of what each of its columns is multiplied with, one output after another."""
    weight, bias = layer.weight.double(), layer.bias.double()
    matrix = weight.T if layer.inputs_first else weight.flatten(1)
    per_group = len(matrix) // len(columns)
    return torch.stack([matrix[o] @ columns[o // per_group] + bias[o] for o in range(len(matrix))])


def width_of(layer):
    return layer.weight.shape[0] if layer.inputs_first else layer.weight[0].numel()


@pytest.mark.parametrize("ratio", [0.3, 0.8])
def test_mean_keeps_every_output_where_it_is_for_the_mean_input(ratio):
    model = Fused()
    relevant = choose_slice(model, slice_ratio=ratio, rule="random", head=())
    means = {name: torch.randn(layer.in_neurons, dtype=torch.float64) for name, layer in layers_of(model).items()}
    # The same value under every place of a kernel.
    columns = {
        name: means[name].view(layer.groups, -1).repeat_interleave(layer.weight[0, 0].numel(), 1)
        for name, layer in layers_of(model).items()
    }
    before = {name: outputs(layer, columns[name]) for name, layer in layers_of(model).items()}
    reset_outside(model, relevant, to="mean", means=means)
    for name, layer in layers_of(model).items():
        assert not layer.weight[~relevant.kept[layer.key]].any()
        assert torch.allclose(outputs(layer, columns[name]), before[name], atol=1e-5)


@pytest.mark.parametrize("ratio", [0.3, 0.8])
def test_reconstruct_is_the_least_squares_fit_of_the_kept_weights(ratio):
    """The reference solves each row by lstsq on the samples themselves, the ridge as rows of its own."""
    model = Fused()
    relevant = choose_slice(model, slice_ratio=ratio, rule="random", head=())
    samples, moments, before = {}, {}, {}
    for name, layer in layers_of(model).items():
        samples[name] = torch.randn(layer.groups, 40, width_of(layer), dtype=torch.float64)
        moment = samples[name].transpose(1, 2) @ samples[name] / 40
        moments[name] = moment[0] if layer.groups == 1 else moment
        before[name] = layer.weight.double().clone()
    reset_outside(model, relevant, to="reconstruct", second_moments=moments)
    for name, layer in layers_of(model).items():
        old, new, kept = before[name], layer.weight.double(), relevant.kept[layer.key]
        if layer.inputs_first:
            old, new, kept = old.T, new.T, kept.T
        old, new, kept = old.flatten(1), new.flatten(1), kept.flatten(1)
        for row in range(len(old)):
            x = samples[name][row // (len(old) // layer.groups)]
            ridge = (RIDGE * 40 * (x.T @ x / 40).diagonal().mean()).sqrt() * torch.eye(x.shape[1], dtype=x.dtype)
            left, right = torch.cat([x, ridge]), torch.cat([x @ old[row], ridge @ (old[row] * kept[row])])
            expected = torch.zeros_like(old[row])
            expected[kept[row]] = torch.linalg.lstsq(left[:, kept[row]], right).solution
            assert torch.allclose(new[row], expected, atol=1e-5)


def test_reconstruct_moves_nothing_where_inputs_are_always_zero():
    model = tiny.mlp(sizes=(4, 3))
    relevant = choose_slice(model, slice_ratio=0.5, rule="random")
    before = model[0].weight.clone()
    reset_outside(model, relevant, to="reconstruct", second_moments={"0": torch.zeros(4, 4)})
    assert torch.equal(model[0].weight, before * relevant.kept["0.weight"])


def test_mean_without_a_bias_is_zero_and_told():
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2))
    relevant = choose_slice(model, slice_ratio=0.5, rule="random", head=())
    with pytest.warns(UserWarning, match=r"1 of 2 weights have no bias.*0\.weight"):
        reset_outside(model, relevant, to="mean", means={"1": torch.ones(3)})
    assert not model[0].weight[~relevant.kept["0.weight"]].any()


@pytest.mark.parametrize(
    ("statistics", "error", "words"),
    [
        ({"to": "mean"}, ValueError, "'mean' needs means="),
        ({"to": "reconstruct"}, ValueError, "'reconstruct' needs second_moments="),
        ({"to": "mean", "means": {}}, LayerMismatchError, "nothing of '0'"),
        ({"to": "mean", "means": {"0": torch.ones(5)}}, LayerMismatchError, "shape .5,., but its weight needs .4,."),
        ({"to": "mean", "means": {"0": torch.full((4,), torch.nan)}}, NonFiniteError, "'0' holds NaN"),
        ({"to": "reconstruct", "second_moments": {"0": torch.ones(4, 3)}}, LayerMismatchError, "needs .4, 4."),
    ],
)
def test_statistics_that_do_not_fit_are_refused_before_anything_is_written(statistics, error, words):
    model = tiny.mlp(sizes=(4, 3))
    before = model[0].weight.clone()
    with pytest.raises(error, match=words):
        reset_outside(model, choose_slice(model, slice_ratio=0.5, rule="random"), **statistics)
    assert torch.equal(model[0].weight, before)


def test_weights_that_were_frozen_after_the_slice_was_chosen_are_told(teacher, relevant):
    teacher.bert.encoder.layer[1].requires_grad_(False)
    with pytest.warns(UserWarning, match="6 of 12 weights of the slice are frozen"):
        reset_outside(teacher, relevant)


def test_a_tied_weight_is_reset_once_for_all_its_names():
    model = tiny.mlp(sizes=(4, 4, 4))
    model[2].weight = model[0].weight
    relevant = choose_slice(model, slice_ratio=0.5, rule="random")
    reset_outside(model, relevant)
    assert model[2].weight is model[0].weight
    assert (model[2].weight == 0).sum() == 8


def seen_of(*tokens):
    return torch.tensor([token in tokens for token in range(tiny.VOCABULARY)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unseen_rows_become_the_mean_of_the_seen_and_nothing_else_changes(dtype):
    student, teacher = tiny.bert().to(dtype), tiny.bert().to(dtype)
    rows = teacher.get_input_embeddings().weight.detach()
    assert reset_unseen_rows(student, seen_of(3, 5, 6)) == tiny.VOCABULARY - 4
    expected = ((rows[3].float() + rows[5].float() + rows[6].float()) / 3).to(dtype)
    for name, parameter in student.named_parameters():
        if "word_embeddings" not in name:
            assert torch.equal(parameter, dict(teacher.named_parameters())[name])
            continue
        for token, row in enumerate(parameter):
            if token in (0, 3, 5, 6):  # 0 is padding
                assert torch.equal(row, rows[token])
            else:
                assert torch.allclose(row, expected, rtol=1e-6)


def test_the_padding_row_is_reset_where_there_is_none():
    model = tiny.gpt2()
    assert model.get_input_embeddings().padding_idx is None
    assert reset_unseen_rows(model, seen_of(3)) == tiny.VOCABULARY - 1
    rows = model.get_input_embeddings().weight
    assert torch.equal(rows, rows[3].expand_as(rows))


def test_where_every_token_is_seen_nothing_is_reset():
    model = tiny.bert()
    assert reset_unseen_rows(model, torch.ones(tiny.VOCABULARY, dtype=torch.bool)) == 0
    assert torch.equal(model.get_input_embeddings().weight, tiny.bert().get_input_embeddings().weight)


def test_what_was_seen_is_not_written_into():
    seen = seen_of(3)
    reset_unseen_rows(tiny.bert(), seen)
    assert seen.tolist() == seen_of(3).tolist()


def test_rows_that_were_reset_train_again():
    model = tiny.bert()
    reset_unseen_rows(model, seen_of(3))
    batch = tiny.text_batches(1)[0]
    model(**batch).loss.backward()
    assert model.get_input_embeddings().weight.grad[batch["input_ids"][0, 0]].any()


@pytest.mark.parametrize("size", [tiny.VOCABULARY - 1, tiny.VOCABULARY + 1])
def test_tokens_of_another_vocabulary_are_refused(size):
    with pytest.raises(LayerMismatchError, match=f"has 60 embedding rows, but .{size},. tokens"):
        reset_unseen_rows(tiny.bert(), torch.ones(size, dtype=torch.bool))


def test_no_seen_token_is_refused():
    model = tiny.bert()
    with pytest.raises(ValueError, match="No token was seen"):
        reset_unseen_rows(model, seen_of())
    assert torch.equal(model.get_input_embeddings().weight, tiny.bert().get_input_embeddings().weight)


@pytest.mark.parametrize("rule", ["random", "top_magnitude", "mag_prune"])
@pytest.mark.parametrize("make", [tiny.bert, tiny.ConvNet], ids=lambda f: f.__name__)
def test_the_share_of_squares_outside_is_counted_weight_by_weight(make, rule):
    model = make()
    relevant = choose_slice(model, slice_ratio=0.7, rule=rule, head=("head",) if make is tiny.ConvNet else None)
    lost = total = 0.0
    for name, parameter in model.named_parameters():
        if name not in relevant.kept:
            continue
        for kept, weight in zip(relevant.kept[name].flatten().tolist(), parameter.flatten().tolist(), strict=True):
            total += weight**2
            lost += 0.0 if kept else weight**2
    assert squares_outside(model, relevant) == pytest.approx(lost / total, rel=1e-6)
    assert 0 < lost < total


def test_a_slice_of_everything_gives_up_no_square_and_rules_compare_as_they_should():
    model = tiny.bert()

    def squares(rule, ratio):
        return squares_outside(model, choose_slice(model, slice_ratio=ratio, rule=rule))

    assert squares("random", 1.0) == 0
    assert squares("mag_prune", 0.9) < squares("random", 0.9) < squares("top_magnitude", 0.9)
    assert squares("random", 0.9) == pytest.approx(0.1, abs=0.02)


def test_a_model_of_zeros_gives_up_no_square():
    model = tiny.mlp()
    relevant = choose_slice(model, slice_ratio=0.5, rule="random")
    with torch.no_grad():
        [parameter.zero_() for parameter in model.parameters()]
    assert squares_outside(model, relevant) == 0


def test_squares_of_half_precision_do_not_overflow():
    model = tiny.mlp().half()
    with torch.no_grad():
        [parameter.fill_(3e4) for parameter in model.parameters()]
    relevant = choose_slice(model, slice_ratio=0.5, rule="random")
    assert squares_outside(model, relevant) == pytest.approx(0.5, abs=0.05)


def test_squares_outside_another_models_slice_are_refused(relevant):
    with pytest.raises(LayerMismatchError):
        squares_outside(tiny.gpt2(), relevant)


def test_rows_that_the_head_is_tied_to_are_left_alone():
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=tiny.VOCABULARY, **sizes))
    before = model.lm_head.weight.clone()
    with pytest.raises(UnsupportedModelError, match="'lm_head' is tied to the input embeddings"):
        reset_unseen_rows(model, seen_of(3))
    assert torch.equal(model.lm_head.weight, before)


def test_rows_that_only_other_embeddings_share_are_reset():
    model = tiny.bart()
    assert reset_unseen_rows(model, seen_of(3)) == tiny.VOCABULARY - 2  # the padding row stays too
