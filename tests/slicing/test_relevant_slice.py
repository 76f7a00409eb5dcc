import copy
import dataclasses
import json
import logging
import struct
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import debug_launcher
from torch import nn

from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.errors import (
    CorruptFileError,
    LayerMismatchError,
    NonFiniteError,
    TeacherMismatchError,
    UnsupportedModelError,
)
from remos_hf.layers import sliceable_layers
from remos_hf.profiling.coverage import CoverageProfile
from remos_hf.profiling.data_pass import profile_coverage
from remos_hf.profiling.sidecar_file import write_tensors
from remos_hf.slicing.ordinal import Selection
from remos_hf.slicing.refill import reset_outside
from remos_hf.slicing.relevant_slice import _PLAIN_FIELDS, RelevantSlice, choose_slice
from remos_hf.slicing.rules import RULES
from tests import reference, tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*never covered.*:UserWarning")


@pytest.fixture(scope="module")
def teacher():
    return tiny.bert()


@pytest.fixture(scope="module")
def profile(teacher):
    return profile_coverage(teacher, tiny.text_batches())


def flat(relevant):
    return [bool(bit) for name in relevant.kept for bit in relevant.kept[name].flatten()]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("ratio", [1.0, 0.97, 0.9, 0.5, 0.01])
def test_the_share_kept_is_exact_to_one_weight_or_one_tie_group(teacher, profile, rule, ratio):
    relevant = choose_slice(teacher, profile, slice_ratio=ratio, rule=rule)
    assert abs(relevant.num_kept - ratio * relevant.num_weights) <= max(1, relevant.tie_group / 2)
    assert relevant.num_kept == sum(flat(relevant))
    assert relevant.share_kept == relevant.num_kept / relevant.num_weights


def test_kept_has_the_shape_of_the_weights_and_true_means_kept(teacher, profile):
    relevant = choose_slice(teacher, profile, slice_ratio=0.5, rule="mag_prune")
    weights = dict(teacher.named_parameters())
    for name, kept in relevant.kept.items():
        assert kept.dtype == torch.bool
        assert kept.shape == weights[name].shape
        assert weights[name][kept].abs().mean() > weights[name][~kept].abs().mean()


def test_the_layers_of_the_profile_compete(teacher, profile):
    assert list(choose_slice(teacher, profile, slice_ratio=0.9).kept) == [
        f"{name}.weight" for name in profile.input_counts
    ]


def test_scope_layer_cuts_each_layer_by_itself(teacher, profile):
    relevant = choose_slice(teacher, profile, slice_ratio=0.8, scope="layer")
    for name, share in relevant.share_by_parameter().items():
        size = relevant.kept[name].numel()
        assert share == pytest.approx(0.8, abs=relevant.tie_group / size)
    alone = copy.copy(profile)
    name = next(iter(profile.input_counts))
    object.__setattr__(alone, "input_counts", {name: profile.input_counts[name]})
    object.__setattr__(alone, "teacher_hash", "")
    first = choose_slice(teacher, alone, slice_ratio=0.8)
    assert torch.equal(first.kept[f"{name}.weight"], relevant.kept[f"{name}.weight"])


def test_artifact_ties_reach_the_slice(teacher, profile):
    from remos_hf.adapters.transformers_models import adapter_for

    layers = list(adapter_for(teacher).layers().values())
    relevant = choose_slice(teacher, profile, slice_ratio=0.9, ties="artifact")
    assert flat(relevant) == reference.artifact_kept(layers, profile, 0.1)


def test_a_slice_is_a_function_of_teacher_profile_and_config(teacher, profile):
    again = profile_coverage(copy.deepcopy(teacher), tiny.text_batches())
    for rule in RULES:
        one = choose_slice(teacher, profile, slice_ratio=0.9, rule=rule, seed=3)
        two = choose_slice(copy.deepcopy(teacher), again, slice_ratio=0.9, rule=rule, seed=3)
        assert one.kept == two.kept


def test_choosing_leaves_the_teacher_alone(teacher, profile):
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    for rule in RULES:
        choose_slice(teacher, profile, slice_ratio=0.5, rule=rule)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_save_and_load_give_the_same_slice_in_one_bit_a_weight(teacher, profile, tmp_path):
    relevant = choose_slice(teacher, profile, slice_ratio=0.9)
    path = relevant.save_pretrained(tmp_path)
    loaded = RelevantSlice.from_pretrained(tmp_path, teacher=teacher)
    assert loaded == relevant and list(loaded.kept) == list(relevant.kept)
    header = struct.unpack("<Q", path.read_bytes()[:8])[0]
    assert path.stat().st_size - header - 8 <= relevant.num_weights / 8 + len(relevant.kept)


def test_plain_bool_tensors_are_packed():
    kept = {"a.weight": torch.tensor([[True, False], [True, True]])}
    relevant = RelevantSlice(kept, 0.75)
    assert relevant.num_kept == 3
    assert torch.equal(relevant.kept["a.weight"], kept["a.weight"])
    with pytest.raises(TypeError, match="'a.weight' is torch.float32"):
        RelevantSlice({"a.weight": torch.ones(2)}, 0.5)


def test_a_slice_for_another_teacher_is_refused(teacher, profile, tmp_path):
    choose_slice(teacher, profile, slice_ratio=0.9).save_pretrained(tmp_path)
    with pytest.raises(TeacherMismatchError, match="another teacher, another dtype"):
        RelevantSlice.from_pretrained(tmp_path, teacher=tiny.bert(seed=1))
    with pytest.raises(LayerMismatchError, match="the model's has"):
        RelevantSlice.from_pretrained(tmp_path, teacher=tiny.bert(hidden=32))
    with pytest.raises(LayerMismatchError, match="no such weight"):
        RelevantSlice.from_pretrained(tmp_path, teacher=tiny.mlp())


def test_a_profile_of_another_teacher_is_refused(profile):
    with pytest.raises(TeacherMismatchError, match="Profile this teacher"):
        choose_slice(tiny.bert(seed=1), profile, slice_ratio=0.9)
    with pytest.raises(LayerMismatchError, match="only the profile has"):
        choose_slice(tiny.gpt2(), profile, slice_ratio=0.9)


@pytest.mark.parametrize("damage", ["truncate", "flip", "shape"])
def test_a_damaged_slice_file_is_refused(teacher, profile, tmp_path, damage):
    path = choose_slice(teacher, profile, slice_ratio=0.9).save_pretrained(tmp_path)
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        content = content[: len(content) // 2]
    elif damage == "flip":
        content[-5] ^= 4
    else:
        content = bytes(content).replace(b"[16, 16]", b"[16, 61]")
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match="remos_slice.safetensors"):
        RelevantSlice.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"shapes": {}},
        {"shapes": {}, "num_kept": 0},
        {"shapes": {"a": [-2, -4]}},
        {"shapes": {"a": [10**18]}},
        {"shapes": "a"},
        {"shapes": {"a": []}},
        {"shapes": {"a": [True] * 8}},
        {"shapes": {"a": [8.0]}},
        {"num_kept": 7},
        {"extra": 1},
        *({"slice_ratio": value} for value in (None, True, 0, 1.1, -0.5, "0.9", [0.9])),
        *({"rule": value} for value in (None, "", 3, "x" * 1000)),
        *({"scope": value} for value in (None, "layers", ["model"])),
        *({"ties": value} for value in (None, "median", {})),
        *({"seed": value} for value in (None, True, 0.5, "0")),
        *({"num_kept": value} for value in (None, 8.0, True, -8, 2**64)),
        *({"tie_group": value} for value in (None, 1.0, -1, "1")),
        *({"teacher_hash": value} for value in (None, 0, False, "abc", "G" * 64)),
    ],
)
def test_a_whole_file_that_says_what_cannot_be_is_refused(tmp_path, changes):
    path, bits = tmp_path / "remos_slice.safetensors", {"a": torch.tensor([255], dtype=torch.uint8)}
    whole = RelevantSlice({"a": torch.ones(8, dtype=torch.bool)}, 1.0)
    fields = {"shapes": {"a": [8]}, **{name: getattr(whole, name) for name in _PLAIN_FIELDS}}
    write_tensors(path, bits, "remos_slice/1", fields)
    assert RelevantSlice.from_pretrained(tmp_path) == whole
    write_tensors(path, bits, "remos_slice/1", {**fields, **changes})
    with pytest.raises(CorruptFileError, match=r"remos_slice\.safetensors"):
        RelevantSlice.from_pretrained(tmp_path)


def test_a_slice_without_a_teachers_hash_says_that_the_teacher_was_not_checked(teacher, profile, caplog):
    caplog.set_level(logging.WARNING, logger="remos_hf")  # a script that ran before may have asked for more
    relevant = choose_slice(teacher, profile, slice_ratio=0.9)
    layers = sliceable_layers(teacher)
    relevant.check_matches(layers)
    assert not caplog.text
    dataclasses.replace(relevant, teacher_hash="").check_matches(layers)
    assert "so the teacher was not checked" in caplog.text


def test_a_folder_without_a_slice_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="RemosTrainer"):
        RelevantSlice.from_pretrained(tmp_path)


@pytest.mark.parametrize("seed", [None, 1.0, True])
def test_a_seed_that_is_no_whole_number_is_refused(teacher, seed):
    with pytest.raises(ValueError, match=f"seed is a whole number, but got {seed}"):
        choose_slice(teacher, slice_ratio=0.9, rule="random", seed=seed)


@pytest.mark.parametrize("ratio", [0, -0.1, 1.2, float("nan"), True, None, "0.9"])
def test_a_ratio_outside_its_range_is_refused_with_the_artifacts_meaning(teacher, profile, ratio):
    with pytest.raises(ValueError, match=f"got {ratio!r}.*prune_ratio is 1 - slice_ratio"):
        choose_slice(teacher, profile, slice_ratio=ratio)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rule": "best"}, "rule is one of"),
        ({"scope": "block"}, "scope is"),
        ({"ties": "first"}, "ties is"),
        ({"ties": "artifact", "rule": "random"}, "reproduces the artifact's remos rule"),
    ],
)
def test_wrong_choices_are_refused(teacher, profile, options, words):
    with pytest.raises(ValueError, match=words):
        choose_slice(teacher, profile, slice_ratio=0.9, **options)


def test_remos_needs_a_profile_and_the_others_do_not(teacher):
    with pytest.raises(ValueError, match="needs a profile"):
        choose_slice(teacher, slice_ratio=0.9)
    assert len(choose_slice(teacher, slice_ratio=0.9, rule="random").kept) == 12


def test_a_layer_that_cannot_be_ranked_is_left_out_and_named():
    model = tiny.mlp()
    model[2].weight = nn.Parameter(torch.zeros(6, 7, dtype=torch.int8), requires_grad=False)
    with pytest.warns(UserWarning, match=r"53 of 95 body weights .*without a magnitude to rank 42 \('2\.weight'"):
        relevant = choose_slice(model, slice_ratio=0.9, rule="random")
    assert list(relevant.kept) == ["0.weight", "4.weight"]


def test_a_model_of_which_nothing_can_be_ranked_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match=r"'0\.weight'.*float64"):
        choose_slice(tiny.mlp().double(), slice_ratio=0.9, rule="random")


def test_a_weight_that_is_not_finite_is_refused_by_name():
    with torch.no_grad():
        broken = tiny.mlp()
        broken[0].weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"'0\.weight'"):
        choose_slice(broken, slice_ratio=0.9, rule="top_magnitude")


def _slice_a_sharded_model(folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(tiny.mlp(), mesh=init_device_mesh("cpu", (2,)))
    try:
        choose_slice(model, slice_ratio=0.9, rule="random")
    except UnsupportedModelError as error:
        (Path(folder) / str(torch.distributed.get_rank())).write_text(str(error))


def test_a_model_that_fsdp_sharded_is_refused_on_every_process(tmp_path):
    debug_launcher(_slice_a_sharded_model, args=(str(tmp_path),), num_processes=2)
    for rank in ("0", "1"):
        message = (tmp_path / rank).read_text()
        assert "'0.weight' cannot be ranked: it is sharded by ZeRO-3 or FSDP" in message
        assert "before the model is wrapped" in message


def test_metadata_is_plain_json(teacher, profile, tmp_path):
    path = choose_slice(teacher, profile, slice_ratio=0.9).save_pretrained(tmp_path)
    size = struct.unpack("<Q", path.read_bytes()[:8])[0]
    metadata = json.loads(json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]["metadata"])
    assert metadata["slice_ratio"] == 0.9
    assert metadata["teacher_hash"] == profile.teacher_hash


def every_fourth(layers, statistics, share, seed):
    return Selection.of([torch.arange(layer.numel).view(layer.shape) % 4 == 0 for layer in layers])


def test_a_rule_of_the_users_own_chooses_and_is_named():
    relevant = choose_slice(tiny.mlp(), slice_ratio=0.25, rule=every_fourth)
    assert relevant.rule == "every_fourth"
    assert relevant.kept["0.weight"].flatten().tolist() == [place % 4 == 0 for place in range(35)]
    assert relevant.num_kept == 9 + 11 + 5


@pytest.mark.parametrize(
    ("rule", "error", "words"),
    [
        (lambda *_: None, TypeError, "gives a Selection"),
        (lambda layers, *_: Selection.of([torch.ones(3, dtype=torch.bool)]), ValueError, "was given 3 layers"),
        (lambda layers, *_: Selection.of([torch.ones(3)]), TypeError, "bool tensors"),
    ],
)
def test_a_rule_that_gives_something_else_is_refused(rule, error, words):
    with pytest.raises(error, match=words):
        choose_slice(tiny.mlp(), slice_ratio=0.25, rule=rule)


@pytest.mark.parametrize("rule", ["random", "top_magnitude", "mag_prune", "remos", every_fourth])
@pytest.mark.parametrize("slice_ratio", [0.5, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_teacher_that_is_not_finite_is_refused_whatever_the_rule(rule, slice_ratio, bad):
    model = tiny.mlp()
    profile = profile_coverage(model, [torch.randn(4, 5)], head=())
    with torch.no_grad():
        model[2].weight[1, 1] = bad
    profile = dataclasses.replace(profile, teacher_hash="")
    with pytest.raises(NonFiniteError, match=r"'2\.weight'"):
        choose_slice(model, profile, slice_ratio=slice_ratio, rule=rule)


def test_a_sparse_teacher_of_which_more_is_kept_than_asked_for_is_told():
    model = tiny.mlp(sizes=(40, 40, 2))
    with torch.no_grad():
        model[0].weight[:20] = 0
    with pytest.warns(UserWarning, match=r"90\.0% .* mag_prune keeps 100\.0%: 800 weights tie .* sparse already"):
        choose_slice(model, slice_ratio=0.9, rule="mag_prune", head=("2",))


def test_how_much_of_the_body_competed_is_saved_with_the_slice(tmp_path):
    relevant = choose_slice(tiny.bert(), slice_ratio=0.9, rule="random")
    relevant.save_pretrained(tmp_path)
    found = RelevantSlice.from_pretrained(tmp_path)
    assert found.account == relevant.account
    assert found.account.competing == relevant.num_weights


def test_a_slice_without_an_account_still_loads(tmp_path):
    relevant = dataclasses.replace(choose_slice(tiny.bert(), slice_ratio=0.9, rule="random"), account=None)
    relevant.save_pretrained(tmp_path)
    assert RelevantSlice.from_pretrained(tmp_path) == relevant


def test_slices_of_experts_are_saved_one_bit_a_weight_and_reset_their_expert_alone(tmp_path):
    config = transformers.GptOssConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        head_dim=4,
    )
    teacher = transformers.GptOssForCausalLM(config)
    relevant = choose_slice(teacher, slice_ratio=0.5, rule="top_magnitude")
    file = relevant.save_pretrained(tmp_path)
    assert file.stat().st_size < relevant.num_weights / 8 + 8000
    found = RelevantSlice.from_pretrained(tmp_path, teacher=teacher)
    student = reset_outside(copy.deepcopy(teacher), found)
    stack = "model.layers.0.mlp.experts.down_proj"
    before, after = teacher.get_parameter(stack), student.get_parameter(stack)
    kept = torch.stack([found.kept[f"{stack}[{expert}]"] for expert in range(3)])
    assert torch.equal(after, before * kept)
    largest_kept = max(float(layer.weight.abs()[found.kept[key]].max()) for key, layer in keyed(teacher).items())
    least_given_up = min(float(layer.weight.abs()[~found.kept[key]].min()) for key, layer in keyed(teacher).items())
    assert largest_kept <= least_given_up


def keyed(model):
    return {layer.key: layer for layer in adapter_for(model).layers().values()}


def mixtral():
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=20,
            hidden_size=8,
            intermediate_size=6,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=3,
        )
    )


def qwen3_moe():
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            vocab_size=20,
            hidden_size=8,
            intermediate_size=6,
            moe_intermediate_size=6,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_experts=3,
            head_dim=4,
        )
    )


def attention_without_modules():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12), 1, enable_nested_tensor=False)


def clip():
    sizes = {"hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=sizes | {"vocab_size": 20}, vision_config=sizes | {"image_size": 4, "patch_size": 2}
    )
    return transformers.CLIPModel(config)


def squeezebert():
    config = transformers.SqueezeBertConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, embedding_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    return transformers.SqueezeBertForSequenceClassification(config)


@pytest.mark.parametrize("make", [mixtral, qwen3_moe, attention_without_modules, clip, squeezebert])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_kind_of_layer_is_sliced_as_by_brute_force(make, seed):
    torch.manual_seed(seed)
    teacher = make()
    layers = adapter_for(teacher).layers()
    ends = [
        {name: torch.randint(0, 9, (getattr(layer, end),)) for name, layer in layers.items()}
        for end in ("in_neurons", "out_neurons")
    ]
    profile = CoverageProfile(*ends, 8)
    relevant = choose_slice(teacher, profile, slice_ratio=0.6)
    assert list(relevant.kept) == [layer.key for layer in layers.values()]
    assert not relevant.account.is_low
    expected = reference.best_threshold_sets(
        reference.ordinal_scores(list(layers.values()), profile), round(0.6 * relevant.num_weights)
    )
    assert flat(relevant) in expected


def test_samples_in_place_of_a_profile_are_told_what_to_do_first():
    with pytest.raises(TypeError, match="profile_coverage.* gives, but got list: profile the student's data first"):
        choose_slice(tiny.bert(), [{"text": "a good film"}], slice_ratio=0.9)
    with pytest.raises(TypeError, match="relevant is what choose_slice gives, but got list"):
        reset_outside(tiny.bert(), [{"text": "a good film"}])
