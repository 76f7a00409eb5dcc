import json

import pytest
import torch

from remos_hf.applications.protection import HIDDEN_FILE, HiddenWeights, hide_weights, relearn
from remos_hf.applications.weight_ranking import highest_scoring, weight_scores
from remos_hf.errors import CorruptFileError, LayerMismatchError, TeacherMismatchError
from remos_hf.profiling.sidecar_file import read_tensors, write_tensors
from tests import tiny


def setting(method="magnitude", share=0.3):
    model = tiny.ConvNet().eval()
    return model, highest_scoring(model, weight_scores(model, method), share, head=())


def test_hidden_weights_are_zero_and_come_back_bit_for_bit_through_a_file(tmp_path):
    model, chosen = setting()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    hidden = hide_weights(model, chosen)
    for name, place in chosen.kept.items():
        assert not model.state_dict()[name][place].any()
        assert torch.equal(model.state_dict()[name][~place], before[name][~place])
    assert hidden.share == pytest.approx(chosen.share_kept)
    hidden.save_pretrained(tmp_path / "apart")
    HiddenWeights.from_pretrained(tmp_path / "apart").put_back(model)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_random_hides_without_replacement():
    _, chosen = setting("random", 0.5)
    assert all(int(one.sum()) == round(0.5 * one.numel()) for one in chosen.kept.values())


def test_the_attacker_relearns_hidden_weights_of_every_kind():
    model, chosen = setting()
    model.requires_grad_(False)
    hide_weights(model, chosen)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    samples = [(image, place % 4) for place, image in enumerate(torch.randn(16, 3, 8, 8) + 1)]
    relearn(
        model, samples, optimizer=lambda one: torch.optim.SGD(one.parameters(), 0.1), epochs=3, batch_size=8,
        progress=False,
    )  # fmt: skip
    for name, place in chosen.kept.items():
        now = model.state_dict()[name]
        assert float((now[place] != 0).float().mean()) > 0.5, name
    assert all(not torch.equal(one, before[name]) for name, one in model.named_parameters())


def test_another_model_is_refused():
    model, chosen = setting()
    hidden = hide_weights(model, chosen)
    with pytest.raises(LayerMismatchError, match="hidden"):
        hidden.put_back(tiny.mlp())
    with pytest.raises(TeacherMismatchError):
        hide_weights(model, chosen)


def broken(tensors, told, how):
    place = next(one for one in tensors if one.startswith("places/"))
    name = place.removeprefix("places/")
    if how == "bits":
        tensors[place] = ~tensors[place]
    elif how == "values":
        del tensors[f"values/{name}"]
    elif how == "more":
        tensors["values/other"] = torch.zeros(2)
    elif how == "shapes":
        told["shapes"] = {name: ["8"]}
    elif how == "size":
        told["shapes"][name] = [2**39, 2**39]


@pytest.mark.parametrize("how", ["bits", "values", "more", "shapes", "size"])
def test_a_broken_file_is_refused(tmp_path, how):
    path = hide_weights(*setting()).save_pretrained(tmp_path)
    tensors, told = read_tensors(path, "remos_hf.hidden.v1", ("shapes",))
    told = json.loads(json.dumps({"shapes": told["shapes"]}))
    broken(tensors, told, how)
    write_tensors(tmp_path / HIDDEN_FILE, tensors, "remos_hf.hidden.v1", told)
    with pytest.raises(CorruptFileError):
        HiddenWeights.from_pretrained(tmp_path)


def test_what_was_frozen_is_frozen_again_whether_the_attack_ran_or_not():
    model, _ = setting()
    model.conv.requires_grad_(False)
    build = lambda one: torch.optim.SGD(one.parameters(), 0.1)  # noqa: E731
    relearn(model, [(torch.randn(3, 8, 8), 0)] * 4, optimizer=build, epochs=1, progress=False)
    with pytest.raises(ValueError, match="no sample"):
        relearn(model, [], optimizer=build, epochs=1, progress=False)
    frozen = {name for name, one in model.named_parameters() if not one.requires_grad}
    assert frozen == {"conv.weight", "conv.bias"}
