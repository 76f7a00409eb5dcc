import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn
from transformers import BertForMaskedLM, MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

from remos_hf.adapters.weights_hash import hash_of_folder, hash_of_model
from remos_hf.errors import CorruptFileError
from tests import tiny


def mixtral():
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=20,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=3,
        )
    )


def tied_masked_lm():
    config = tiny.bert().config
    config.tie_word_embeddings = True
    return BertForMaskedLM(config)


def with_batch_norm():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


@pytest.mark.parametrize("shards", [None, "2KB"])
@pytest.mark.parametrize("make", [tiny.bert, tiny.gpt2, tiny.vit, tied_masked_lm, mixtral])
def test_a_model_and_its_checkpoint_have_one_hash(make, shards, tmp_path):
    model = make()
    model.save_pretrained(tmp_path, **({"max_shard_size": shards} if shards else {}))
    assert hash_of_folder(tmp_path) == hash_of_model(model)
    assert hash_of_folder(tmp_path) == hash_of_model(type(model).from_pretrained(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_another_precision_has_another_hash(dtype, tmp_path):
    model = tiny.bert()
    before = hash_of_model(model)
    model.to(dtype).save_pretrained(tmp_path)
    assert hash_of_folder(tmp_path) == hash_of_model(model) != before


def test_what_trainer_and_save_model_write_of_a_plain_module_has_its_hash(tmp_path):
    model = with_batch_norm()
    model(torch.rand(5, 3, 3, 3))  # moves the running statistics, which are saved
    save_model(model, str(tmp_path / "model.safetensors"))
    assert hash_of_folder(tmp_path) == hash_of_model(model)
    arguments = TrainingArguments(str(tmp_path / "by_trainer"), use_cpu=True, report_to="none")
    Trainer(model, arguments).save_model()
    assert hash_of_folder(tmp_path / "by_trainer") == hash_of_model(model)


def test_a_tensor_that_is_saved_twice_counts_once(tmp_path):
    model = tied_masked_lm()
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors")
    assert hash_of_folder(tmp_path) == hash_of_model(model)


def test_every_weight_and_every_buffer_counts(tmp_path):
    model = with_batch_norm()
    for tensor in model.state_dict().values():
        before = hash_of_model(model)
        tensor.view(-1)[-1] += 1
        assert hash_of_model(model) != before


def test_shape_counts():
    square, row = nn.Linear(2, 2, bias=False), nn.Linear(4, 1, bias=False)
    row.weight.data = square.weight.data.reshape(1, 4)
    assert hash_of_model(square) != hash_of_model(row)


def test_a_folder_without_safetensors_has_none(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert hash_of_folder(tmp_path) is None
    assert hash_of_folder(tmp_path / "not there") is None


def test_a_truncated_file_is_refused(tmp_path):
    save_model(with_batch_norm(), str(tmp_path / "model.safetensors"))
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-8])
    with pytest.raises(CorruptFileError, match="truncated"):
        hash_of_folder(tmp_path)
