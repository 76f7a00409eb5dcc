import logging
import warnings
from pathlib import Path

import pytest
import torch
from accelerate import debug_launcher
from torch import nn
from transformers import LongformerConfig, LongformerModel

from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import NonFiniteError, UnsupportedModelError
from remos_hf.profiling import data_pass
from remos_hf.profiling.coverage import CoverageProfile
from remos_hf.profiling.criteria import median_coverage, strong_coverage, threshold_coverage, top_k_coverage
from remos_hf.profiling.data_pass import profile_coverage
from remos_hf.profiling.observers import Activation
from tests import reference, tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*never covered.*:UserWarning")

CRITERIA = {
    "median": (median_coverage(), None),
    "nc": (threshold_coverage(0.4), 0.4),
    "tknc": (top_k_coverage(3), 3),
    "snac": (strong_coverage(2), 2),
}
MODELS = {
    "bert": (tiny.bert, tiny.text_batches),
    "gpt2": (tiny.gpt2, tiny.text_batches),
    "gpt2 padded on the left": (tiny.gpt2, lambda: tiny.text_batches(left=True)),
    "bloom": (tiny.bloom, tiny.text_batches),
    "llama": (tiny.llama, tiny.text_batches),
    "vit": (tiny.vit, lambda: [(images,) for images, _ in tiny.image_batches()]),
    "convolutions": (tiny.ConvNet, tiny.image_batches),
    "linear": (tiny.mlp, lambda: [torch.randn(6, 5), torch.randn(2, 5)]),
}


@pytest.mark.parametrize("kind", CRITERIA)
@pytest.mark.parametrize("name", MODELS)
def test_counts_agree_with_brute_force(name, kind):
    make, batches = MODELS[name]
    model, batches = make().eval(), batches()
    criterion, parameter = CRITERIA[kind]
    profile = profile_coverage(model, batches, criterion=criterion)
    layers = adapter_for(model).layers()
    assert set(profile.input_counts) == set(layers)
    as_tuples = [batch if isinstance(batch, (dict, tuple)) else (batch,) for batch in batches]
    expected = reference.brute_force_profile(model, layers, as_tuples, kind, parameter)
    for (layer, end), counts in expected.items():
        found = getattr(profile, f"{end}_counts")[layer]
        assert torch.equal(found, counts), (layer, end)
    assert any(counts.any() for counts in expected.values())


def test_profiles_of_halves_add_up_to_the_profile_of_all():
    model, batches = tiny.bert(), tiny.text_batches(count=5)
    whole = profile_coverage(model, batches)
    assert profile_coverage(model, batches[:2]) + profile_coverage(model, batches[2:]) == whole
    assert profile_coverage(model, batches[3:]) + profile_coverage(model, batches[:3]) == whole


def test_a_saved_profile_is_taken_up_where_it_stopped(tmp_path):
    model, batches = tiny.bert(), tiny.text_batches(count=5)
    profile_coverage(model, batches[:3]).save(tmp_path)
    resumed = CoverageProfile.load(tmp_path) + profile_coverage(model, batches[3:])
    assert resumed == profile_coverage(model, batches)


def test_more_padding_changes_nothing():
    model, batches = tiny.bert(), tiny.text_batches()
    wider = [
        {**batch, **{k: nn.functional.pad(batch[k], (0, 7)) for k in ("input_ids", "attention_mask")}}
        for batch in batches
    ]
    narrow, wide = profile_coverage(model, batches), profile_coverage(model, wider)
    assert narrow.output_counts.keys() == wide.output_counts.keys()
    for name, counts in narrow.input_counts.items():
        assert torch.equal(counts, wide.input_counts[name])
        assert torch.equal(narrow.output_counts[name], wide.output_counts[name])


def test_labels_are_not_needed_and_do_not_matter():
    model, batches = tiny.bert(), tiny.text_batches()
    unlabelled = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]
    assert profile_coverage(model, unlabelled) == profile_coverage(model, batches)


def test_a_stream_is_read_only_as_far_as_max_samples():
    model, batches = tiny.bert(), tiny.text_batches(count=4, size=4)
    read = []

    def stream():
        for batch in batches:
            read.append(1)
            yield batch

    profile = profile_coverage(model, stream(), max_samples=6)
    assert profile.num_samples == 6
    assert len(read) == 2
    cut = {key: value[:2] for key, value in batches[1].items()}
    assert profile == profile_coverage(model, [batches[0], cut])


class Reusing(nn.Module):
    """Frees each activation before the next one of the same shape is made, and overwrites one in place."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        hidden = self.first(x + 1)
        del x
        hidden = self.second(hidden.exp())
        hidden.neg_()  # the same object, other values
        return self.third(hidden)


def test_freed_memory_and_values_written_in_place_are_not_mistaken_for_shared_tensors():
    model, batches = Reusing(), [(torch.randn(8, 6),) for _ in range(4)]
    profile = profile_coverage(model, batches)
    for (layer, end), counts in reference.brute_force_profile(model, adapter_for(model).layers(), batches).items():
        assert torch.equal(getattr(profile, f"{end}_counts")[layer], counts), (layer, end)


def test_a_tensor_that_several_layers_read_is_reduced_once(monkeypatch):
    made = []
    monkeypatch.setattr(data_pass, "Activation", lambda *args: (made.append(Activation(*args)), made[-1])[1])
    profile_coverage(tiny.bert(layers=1), tiny.text_batches(count=1))
    # q, k, v read one tensor: 6 outputs, and 4 inputs instead of 6
    assert len(made) == 10


def test_a_module_that_runs_twice_covers_a_sample_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.layer(x))

    model, batch = Twice(), torch.randn(9, 4)
    profile = profile_coverage(model, [batch], criterion=top_k_coverage(1))
    with torch.no_grad():
        calls = [batch.argmax(1), model.layer(batch).argmax(1)]
    expected = [sum(neuron in (int(a), int(b)) for a, b in zip(*calls, strict=True)) for neuron in range(4)]
    assert profile.input_counts["layer"].tolist() == expected
    assert sum(expected) > 9  # the calls covered different neurons


def test_tied_layers_count_under_one_name():
    model = tiny.mlp(sizes=(4, 4, 4))
    model[2].weight = model[0].weight
    profile = profile_coverage(model, [torch.randn(9, 4)], criterion=top_k_coverage(4))
    assert list(profile.input_counts) == ["0"]
    assert profile.output_counts["0"].tolist() == [9] * 4


def test_embedding_rows_are_covered_by_samples_that_show_their_token():
    model, batches = tiny.bert(), tiny.text_batches()
    profile = profile_coverage(model, batches, embeddings=True)
    counts = profile.input_counts["bert.embeddings.word_embeddings"]
    for token in range(tiny.VOCABULARY):
        expected = sum(
            int(((batch["input_ids"] == token) & batch["attention_mask"].bool()).any(1).sum()) for batch in batches
        )
        assert counts[token] == expected
    assert counts[0] == 0  # padding


@pytest.mark.parametrize("make", [tiny.bert, tiny.gpt2, tiny.llama], ids=lambda f: f.__name__)
def test_hidden_states_see_one_end_of_every_layer(make):
    model, batches = make(), tiny.text_batches()
    profile = profile_coverage(model, batches, source="hidden_states", criterion=top_k_coverage(3))
    adapter = adapter_for(model)
    assert set(profile.input_counts) == set(adapter.layers())
    for name, layer in adapter.layers().items():
        writes = adapter.writes_to_stream(layer)
        known, unknown = (profile.output_counts, profile.input_counts)[:: 1 if writes else -1]
        assert known[name].sum() == 3 * profile.num_samples
        assert unknown[name].sum() == 0


def test_hidden_states_agree_with_hooks_where_both_see_the_same_tensor():
    model, batches = tiny.bert(), tiny.text_batches()
    states = profile_coverage(model, batches, source="hidden_states")
    hooks = profile_coverage(model, batches)
    for name in ("bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.attention.self.key"):
        assert torch.equal(states.input_counts[name], hooks.input_counts[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_teachers_are_profiled(dtype):
    profile = profile_coverage(tiny.bert().to(dtype), tiny.text_batches(), criterion=strong_coverage())
    assert 0 < profile.share_never_covered < 1


def test_the_teacher_comes_back_as_it_was(no_hooks_left):
    model = tiny.bert()
    no_hooks_left(model)
    model.train()
    model.bert.encoder.layer[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    profile_coverage(model, tiny.text_batches())
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_dropout_is_off_whatever_the_mode():
    model, batches = tiny.bert(hidden_dropout_prob=0.5), tiny.text_batches()
    assert profile_coverage(model.train(), batches) == profile_coverage(model.eval(), batches)


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_hooks_and_modes_are_put_back_when_the_data_fails(failure, no_hooks_left):
    model = tiny.bert().train()
    no_hooks_left(model)

    def batches():
        yield tiny.text_batches(1)[0]
        raise failure

    with pytest.raises(failure):
        profile_coverage(model, batches())
    assert model.training


def test_no_data_is_an_error():
    with pytest.raises(ValueError, match="nothing to profile"):
        profile_coverage(tiny.mlp(), [])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 2])
def test_an_activation_that_is_not_finite_is_named(bad, place):
    batches = [torch.randn(4, 5) for _ in range(3)]
    batches[place][1, 1] = bad
    with pytest.raises(NonFiniteError, match="input of '0'"):
        profile_coverage(tiny.mlp(), batches)


def test_a_sample_of_padding_alone_covers_nothing_and_breaks_nothing():
    batch = tiny.text_batches(count=1)[0]
    alone = {key: value[1:] for key, value in batch.items()}
    batch["attention_mask"][0] = 0
    model = tiny.gpt2()
    profile, rest = profile_coverage(model, [batch]), profile_coverage(model, [alone])
    assert profile.num_samples == rest.num_samples + 1
    assert all(torch.equal(counts, rest.input_counts[name]) for name, counts in profile.input_counts.items())


def test_a_model_that_mixes_samples_is_refused_by_the_name_of_a_layer():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.second(self.first(x).cumsum(0))

    with pytest.raises(UnsupportedModelError, match="input of 'second' holds other values for a sample beside another"):
        profile_coverage(Mixing(), [torch.randn(5, 4)])


def test_what_no_sample_runs_through_is_refused():
    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(torch.ones(5, 4)).sum() * x

    with pytest.raises(UnsupportedModelError, match="No sliceable layer ran on samples.*'layer'"):
        profile_coverage(Apart(), [torch.randn(5, 4)])


def test_layers_that_never_run_are_left_out_with_a_warning():
    model = tiny.mlp()
    model.unused = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="1 of 4 layers never ran.*unused"):
        profile = profile_coverage(_Skipping(model), [torch.randn(3, 5)])
    assert "inner.unused" not in profile.input_counts


class _Skipping(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        for module in list(self.inner)[:5]:
            x = module(x)
        return x


def told_of_coverage(model, batch, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        profile = profile_coverage(model, [batch], **options)
    return profile, [str(one.message) for one in caught if "never covered" in str(one.message)]


def test_coverage_that_says_nothing_of_many_weights_warns_and_names_the_argument():
    profile, told = told_of_coverage(tiny.mlp(), torch.randn(1, 5), criterion=threshold_coverage(0.99))
    unseen = sum(
        int((profile.input_counts[name] == 0).sum() * (profile.output_counts[name] == 0).sum())
        for name in profile.input_counts
    )
    weights = sum(one.numel() * profile.output_counts[name].numel() for name, one in profile.input_counts.items())
    assert len(told) == 1 and f"both ends of {unseen / weights:.0%} of the weights" in told[0]
    assert "Leave criterion= at its default" in told[0]


def test_most_neurons_never_covered_is_no_reason_to_warn_while_coverage_still_ranks_most_weights():
    model = nn.Linear(10, 10)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.arange(10.0))
    # The top output is the same in all samples, the top inputs are 8 of 10.
    profile, told = told_of_coverage(model, torch.eye(10)[:8], criterion=top_k_coverage(1))
    assert profile.share_never_covered == 0.55 and told == []


def test_the_median_covers_neurons_that_the_threshold_never_does():
    batch = torch.randn(64, 40)
    batch[:, 0] += 30  # one large value, as transformers have: the middle of the range lies above all others
    model = nn.Linear(40, 40)
    by_median, by_threshold = (
        told_of_coverage(model, batch, **options)[0].input_counts[""]
        for options in ({}, {"criterion": threshold_coverage()})
    )
    assert int((by_median == 0).sum()) == 0 and int((by_threshold == 0).sum()) == 39


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"source": "guess"}, "source is"),
        ({"max_samples": 0}, "at least 1, or 'all', but got 0"),
        ({"max_samples": True}, "but got True"),
    ],
)
def test_wrong_arguments_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        profile_coverage(tiny.mlp(), [torch.randn(2, 5)], **options)


def test_a_batch_without_tensors_is_refused():
    with pytest.raises(TypeError, match="must be a tensor"):
        profile_coverage(tiny.mlp(), [{"text": ["a", "b"]}])


def test_an_encoder_decoder_is_profiled_with_the_padding_of_each_side():
    model = tiny.bart()
    batch = tiny.text_batches(count=1, size=3, length=6)[0]
    del batch["labels"]
    batch["decoder_input_ids"] = batch["input_ids"][:, :4].clamp(min=3)
    batch["decoder_attention_mask"] = batch["attention_mask"][:, :4]
    profile = profile_coverage(model.model, [batch], criterion=top_k_coverage(3))
    assert set(profile.input_counts) == set(adapter_for(model.model).layers())


def _profile_share(path):
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    batches = tiny.text_batches(count=1 if "few" in path else 5)
    profile = profile_coverage(tiny.bert(), batches[rank::world], across_processes=True)
    profile.save(f"{path}.{rank}.safetensors")


@pytest.mark.parametrize("name", ["share", "few"])
def test_two_processes_count_what_one_counts(tmp_path, name):
    debug_launcher(_profile_share, args=(str(tmp_path / name),), num_processes=2)
    alone = profile_coverage(tiny.bert(), tiny.text_batches(count=1 if name == "few" else 5))
    for rank in range(2):
        assert CoverageProfile.load(tmp_path / f"{name}.{rank}.safetensors") == alone


def test_inference_mode_around_the_call_changes_nothing():
    model, batches = tiny.ConvNet().eval(), tiny.image_batches()
    expected = profile_coverage(model, batches)
    with torch.inference_mode():
        assert profile_coverage(model, [tuple(part.clone() for part in batch) for batch in batches]) == expected


class Poisoned(nn.Module):
    """What stands at padding is not finite, as after attention of fully masked rows."""

    def __init__(self, poison=float("nan")):
        super().__init__()
        self.inner, self.poison = tiny.bert(layers=1), poison
        self.last = nn.Linear(16, 4)

    def forward(self, input_ids, attention_mask):
        hidden = self.inner.bert(input_ids, attention_mask).last_hidden_state
        return self.last(hidden.masked_fill(attention_mask[..., None] == 0, self.poison))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_what_stands_at_padding_may_be_anything(poison):
    batches = [{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in tiny.text_batches()]
    assert profile_coverage(Poisoned(poison), batches) == profile_coverage(Poisoned(0.0), batches)


def test_nan_at_a_real_position_beside_poisoned_padding_is_still_named():
    class Worse(Poisoned):
        def forward(self, input_ids, attention_mask):
            with torch.no_grad():
                self.last.bias[2] = float("nan")
            return super().forward(input_ids, attention_mask)

    batches = [{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in tiny.text_batches()]
    with pytest.raises(NonFiniteError, match="output of 'last'"):
        profile_coverage(Worse(), batches)


def test_an_endless_stream_is_read_to_the_default(monkeypatch, caplog):
    monkeypatch.setattr(data_pass, "DEFAULT_MAX_SAMPLES", 10)

    def stream():
        while True:
            yield torch.randn(4, 5)

    with caplog.at_level(logging.INFO, "remos_hf"):
        profile = profile_coverage(tiny.mlp(), stream())
    assert (profile.num_samples, profile.capped) == (10, True)
    assert "stopped at max_samples=10" in caplog.text
    whole = profile_coverage(tiny.mlp(), (torch.randn(4, 5) for _ in range(6)), max_samples="all")
    assert (whole.num_samples, whole.capped) == (24, False)


def test_that_a_cap_applied_is_kept_with_the_profile(tmp_path):
    profile = profile_coverage(tiny.mlp(), [torch.randn(4, 5)], max_samples=2)
    profile.save(tmp_path)
    assert CoverageProfile.load(tmp_path).capped


def test_samples_that_run_one_at_a_time_are_told(caplog):
    class Chosen(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            rows = x.flatten(0, 1)
            return self.layer(rows[rows[:, 0] > 0])

    profile_coverage(Chosen(), [torch.randn(5, 6, 4)])
    assert "Samples run one at a time, which takes longer: rows of 'layer'" in caplog.text


def _fail_on_one(path):
    rank = torch.distributed.get_rank()
    batches = [torch.randn(4, 5), torch.randn(4, 5)]
    if rank:
        batches[1] = torch.full((4, 5), float("nan"))[:, :3]
    try:
        profile_coverage(tiny.mlp(), batches, across_processes=True)
    except Exception as error:  # noqa: BLE001 - what it says is looked at
        Path(f"{path}.{rank}").write_text(str(error))


def test_a_process_that_fails_stops_the_others(tmp_path):
    debug_launcher(_fail_on_one, args=(str(tmp_path / "said"),), num_processes=2)
    assert (
        "Process 1 failed while it profiled its share of the data: RuntimeError: mat1"
        in (tmp_path / "said.0").read_text()
    )
    assert "mat1" in (tmp_path / "said.1").read_text()


def test_a_model_that_pads_by_itself_is_refused_where_there_is_padding():
    torch.manual_seed(0)
    config = LongformerConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        attention_window=8, max_position_embeddings=40,
    )  # fmt: skip
    model = LongformerModel(config).eval()
    with pytest.raises(UnsupportedModelError, match="padding of the 1 samples cannot be found.*hidden_states"):
        profile_coverage(model, [{k: v for k, v in tiny.text_batches(count=1)[0].items() if k != "labels"}])
