import dataclasses

import pytest
import torch

from remos_hf.errors import CorruptFileError, LayerMismatchError, RemosError, TeacherMismatchError
from remos_hf.layers import sliceable_layers
from remos_hf.profiling.coverage import CoverageProfile
from remos_hf.profiling.data_pass import profile_coverage
from remos_hf.profiling.sidecar_file import write_tensors
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*never covered.*:UserWarning")


@pytest.fixture
def profile():
    return profile_coverage(tiny.ConvNet(), tiny.image_batches(), head=("head",))


def changed(profile, **fields):
    return CoverageProfile(**{**vars(profile), **fields})


def test_save_and_load_give_the_same_profile(profile, tmp_path):
    profile.save(tmp_path)
    assert (tmp_path / "remos_coverage.safetensors").is_file()
    assert CoverageProfile.load(tmp_path) == profile
    assert CoverageProfile.load(profile.save(tmp_path / "other.safetensors")) == profile


def test_profiles_differ_by_counts_samples_and_teacher(profile):
    counts = {name: count + 1 for name, count in profile.input_counts.items()}
    for fields in ({"input_counts": counts}, {"num_samples": 1}, {"teacher_hash": "other"}):
        assert changed(profile, **fields) != profile


def test_adding_sums_counts_and_samples(profile):
    double = profile + profile
    assert double.num_samples == 2 * profile.num_samples
    for name, counts in profile.output_counts.items():
        assert torch.equal(double.output_counts[name], 2 * counts)
        assert double.output_counts[name].dtype == torch.int64


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"input_counts": {}, "output_counts": {}}, LayerMismatchError),
        ({"criterion": {"name": "TopKCoverage", "k": 3}}, LayerMismatchError),
        ({"source": "hidden_states"}, LayerMismatchError),
        ({"teacher_hash": "other"}, TeacherMismatchError),
    ],
)
def test_profiles_that_were_counted_otherwise_do_not_add(profile, fields, error):
    with pytest.raises(error):
        profile + changed(profile, **fields)


def test_the_share_never_covered_counts_both_ends():
    profile = CoverageProfile({"a": torch.tensor([0, 3])}, {"a": torch.tensor([0, 0, 1])}, 4)
    assert profile.share_never_covered == 3 / 5


def test_a_profile_of_another_model_is_refused_with_the_layer(profile):
    with pytest.raises(LayerMismatchError, match="only the profile has 'stem'"):
        profile.check_matches(sliceable_layers(tiny.mlp()))
    wider = tiny.ConvNet()
    wider.down = torch.nn.Conv2d(8, 16, 1)
    with pytest.raises(LayerMismatchError, match="'down' has 8 input and 16 output neurons.*8 and 12"):
        profile.check_matches(sliceable_layers(wider))


@pytest.mark.parametrize(
    "tensors",
    [
        {"weights.a": torch.zeros(2, dtype=torch.int64)},
        {"input_counts.a": torch.zeros(2, dtype=torch.int64)},
        {"input_counts.a": torch.tensor([-1]), "output_counts.a": torch.tensor([0])},
        {"input_counts.a": torch.tensor([5]), "output_counts.a": torch.tensor([0])},
        {"input_counts.a": torch.tensor([1.0]), "output_counts.a": torch.tensor([0])},
    ],
)
def test_a_whole_file_that_holds_no_counts_is_refused(profile, tmp_path, tensors):
    metadata = {**profile._metadata(), "num_samples": 4}
    write_tensors(tmp_path / "remos_coverage.safetensors", tensors, "remos_coverage/1", metadata)
    with pytest.raises(CorruptFileError, match=r"remos_coverage\.safetensors"):
        CoverageProfile.load(tmp_path)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("num_samples", [True, 3.0, "3", None, -1, 2**24 + 1, 2**31, 10**30]),
        ("criterion", [None, [], "NC", 3]),
        ("source", ["", None, ["hooks"], "else"]),
        ("teacher_hash", [None, 0, False, [], "abc", "A" * 64, "g" * 64]),
        ("data_fingerprint", [None, 7, "", "xyz", "f" * 65]),
    ],
)
def test_a_field_of_another_type_is_refused_by_name_though_the_checksum_is_right(profile, tmp_path, field, values):
    for value in values:
        metadata = {**profile._metadata(), field: value}
        write_tensors(tmp_path / "remos_coverage.safetensors", {}, "remos_coverage/1", metadata)
        with pytest.raises(CorruptFileError, match=rf"remos_coverage\.safetensors should say .* for {field}"):
            CoverageProfile.load(tmp_path)


def test_more_samples_than_weights_can_be_ranked_by_are_refused_before_a_table_is_made(profile):
    many, layers = dataclasses.replace(profile, num_samples=2**28), sliceable_layers(tiny.ConvNet())
    with pytest.raises(RemosError, match="268,435,456 samples.*at most 16,777,216"):
        many.check_matches(layers)


def test_a_tampered_profile_is_refused(profile, tmp_path):
    path = profile.save(tmp_path)
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptFileError):
        CoverageProfile.load(tmp_path)
