import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from remos_hf.adapters.architecture import (
    check_complete,
    check_fits,
    get_model_conversion_mapping,
    head_names,
    missing_tensors,
    on_meta,
    place_tensors,
    saved_class,
    settled_dtype,
)
from remos_hf.adapters.teacher_files import Checkpoint
from remos_hf.errors import UnsupportedModelError
from tests import tiny
from tests.slicing.on_disk.test_streaming import MAKERS, mixtral


def placed_in(model, folder):
    model.save_pretrained(folder)
    blank = on_meta(model.config, type(model))
    return blank, place_tensors(blank, Checkpoint.in_folder(folder))


@pytest.mark.parametrize("kind", MAKERS)
def test_every_saved_tensor_has_a_place_and_nothing_is_missing(tmp_path, kind):
    blank, placed = placed_in(MAKERS[kind](), tmp_path)
    check_fits(blank, placed)
    assert not placed.unknown and not missing_tensors(blank, placed)


def test_a_lying_config_costs_no_memory():
    model = on_meta(transformers.BertConfig(hidden_size=2**20, num_attention_heads=1, vocab_size=2**30))
    assert model.device.type == "meta" and model.num_parameters() > 2**49


def test_building_changes_neither_the_config_nor_the_random_state():
    config = transformers.BertConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1)
    before, state = config.to_dict(), torch.get_rng_state()
    on_meta(config)
    assert config.to_dict() == before and torch.equal(torch.get_rng_state(), state)


@pytest.mark.skipif(get_model_conversion_mapping is None, reason="transformers 4 stacks no experts")
@pytest.mark.parametrize("damage", ["lost", "cut", "one more"])
def test_an_expert_that_is_not_all_there_is_named(tmp_path, damage):
    model = mixtral()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    up = next(name for name in tensors if "experts.1.w3" in name)
    if damage == "lost":
        del tensors[up]
    elif damage == "cut":
        tensors[up] = tensors[up][:-1].clone()
    else:
        tensors |= {up.replace("w3", w).replace("experts.1", "experts.2"): tensors[up].clone() for w in ("w1", "w3")}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    blank = on_meta(model.config, type(model))
    with pytest.raises(UnsupportedModelError, match="experts"):
        check_fits(blank, place_tensors(blank, Checkpoint.in_folder(tmp_path)))


def test_the_head_is_what_the_body_does_not_share():
    assert "classifier.weight" in head_names(tiny.bert()) and "bert.pooler.dense.bias" in head_names(tiny.bert())
    torch.manual_seed(0)
    tied = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=9, n_embd=4, n_layer=1, n_head=1))
    assert "lm_head.weight" not in head_names(tied)


def test_a_missing_body_is_refused_and_a_missing_head_is_told(caplog):
    model = tiny.bert()
    check_complete(model, ["classifier.weight"], "somewhere")
    assert "classifier.weight" in caplog.text
    with pytest.raises(UnsupportedModelError, match=r"somewhere lacks 'bert\.embeddings\.LayerNorm\.bias' and 1 more"):
        check_complete(
            model, ["bert.embeddings.LayerNorm.bias", "bert.encoder.layer.0.x", "classifier.bias"], "somewhere"
        )


@pytest.mark.parametrize("names", [["Evil"], ["pipeline"], ["PreTrainedModel"], ["GPT2Model"], [], [3]])
def test_only_a_class_of_transformers_for_this_config_is_built(names):
    config = transformers.BertConfig(architectures=names)
    if not names:
        assert saved_class(config) is transformers.BertModel
        return
    with pytest.raises(UnsupportedModelError, match="auto_map"):
        saved_class(config)


def test_the_type_is_the_configs_or_else_the_first_tensors(tmp_path):
    tiny.bert().to(torch.float16).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for given, expected in (("bfloat16", torch.bfloat16), (None, torch.float16)):
        config.pop("torch_dtype", None)
        config["dtype"] = given
        (tmp_path / "config.json").write_text(json.dumps(config))
        found = transformers.AutoConfig.from_pretrained(tmp_path)
        assert settled_dtype(found, Checkpoint.in_folder(tmp_path)) == expected
