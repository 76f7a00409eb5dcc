import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model

from remos_hf.errors import UnsupportedModelError
from remos_hf.training.lora import base_of
from tests import tiny

TARGETS = ["query", "value"]


def adapted(config=None, model=None):
    return get_peft_model(tiny.bert() if model is None else model, config or LoraConfig(r=2, target_modules=TARGETS))


def batch():
    return {key: value for key, value in tiny.text_batches(1)[0].items() if key != "labels"}


def test_any_other_model_is_its_own_base():
    model = tiny.bert()
    with base_of(model) as base:
        assert base is model


def test_within_the_block_the_base_is_the_model_that_was_given():
    plain = tiny.bert()
    model = adapted()
    with base_of(model) as base:
        assert [name for name, _ in base.named_modules()] == [name for name, _ in plain.named_modules()]
        assert list(base.state_dict()) == list(plain.state_dict())
        assert all(parameter.requires_grad for parameter in base.parameters())


def test_afterwards_adapters_and_freedom_are_what_they_were():
    model = adapted(LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["classifier"]))
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(KeyError), base_of(model):
        raise KeyError
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_what_is_changed_in_the_base_is_what_the_adapted_model_starts_from():
    model = adapted(LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["intermediate.dense", "classifier"]))
    with base_of(model) as base, torch.no_grad():
        for layer in base.bert.encoder.layer:
            layer.attention.self.query.weight[:, ::2] = 0
            layer.intermediate.dense.weight[::2] = 0
        expected = base(**batch()).logits
    with torch.no_grad():
        assert torch.equal(model(**batch()).logits, expected)
        with model.disable_adapter():  # DPOTrainer's reference
            assert torch.equal(model(**batch()).logits, expected)


@pytest.mark.parametrize("side", ["lora_B", "lora_embedding_B"])
def test_trained_adapters_are_refused(side):
    targets = [*TARGETS, "word_embeddings"]
    model = adapted(LoraConfig(r=2, target_modules=targets))
    next(value for name, value in model.named_parameters() if side in name).data[0, 0] = 1e-6
    with pytest.raises(UnsupportedModelError, match="B is not zero"), base_of(model):
        pass


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (LoraConfig(r=2, target_modules=TARGETS, use_dora=True), "DoRA"),
        (LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="pissa"), "PiSSA"),
        (IA3Config(target_modules=TARGETS, feedforward_modules=[]), "IA3"),
        (PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2), "PROMPT_TUNING"),
    ],
)
def test_adapters_whose_function_is_not_the_bases_are_refused(config, says):
    with pytest.raises(UnsupportedModelError, match=says), base_of(adapted(config)):
        pass


def test_trainable_tokens_beside_lora_are_accepted():
    model = adapted(LoraConfig(r=2, target_modules=TARGETS, trainable_token_indices={"word_embeddings": [1, 2]}))
    with base_of(model) as base:
        assert list(base.state_dict()) == list(tiny.bert().state_dict())
