import logging

import pytest
import torch
import transformers
from torch import nn

from remos_hf.errors import LayerMismatchError, UnsupportedModelError
from remos_hf.profiling.coverage import CoverageProfile
from remos_hf.slicing import competition
from remos_hf.slicing.competition import Account, competing_layers
from tests import tiny


class Net(nn.Module):
    """A body of every kind of weight, under a head that is tied to its embeddings."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(10, 4)
        self.places = nn.Embedding(6, 4)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.lstm = nn.LSTM(4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 10, bias=False)


def body_of(model, head=("head",)):
    """Every weight of two or more axes outside the head, by plain loops."""
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and not name.startswith(head)
    )


def profile_of(layers):
    return CoverageProfile(
        {name: torch.zeros(layer.in_neurons, dtype=torch.int64) for name, layer in layers.items()},
        {name: torch.zeros(layer.out_neurons, dtype=torch.int64) for name, layer in layers.items()},
        1,
    )


def test_every_weight_of_the_body_is_counted_once_with_its_reason():
    model = Net()
    model.head.weight = model.words.weight
    model.second.weight.requires_grad_(False)
    layers, account = competing_layers(model, head=("head",))
    assert list(layers) == ["first"]
    assert account.competing == 16
    assert dict(account.left_out) == {
        competition.UNKNOWN: 4 + 2 * 16 * 4,
        competition.TIED: 40,
        competition.EMBEDDING: 24,
        competition.FROZEN: 16,
        competition.UNRANKABLE: 16 + 4,
    }
    assert account.total == body_of(model) == account.competing + sum(account.left_out.values())
    assert account.examples[competition.TIED] == "words.weight"


def test_the_sentence_tells_numbers_share_and_reasons():
    account = Account(16, 64, {"frozen": 48}, {"frozen": "a.weight"})
    assert str(account) == "16 of 64 body weights compete (25.0 %); left out: frozen 48 ('a.weight')"
    assert str(Account(5, 5)) == "5 of 5 body weights compete (100.0 %)"


def test_less_than_half_is_a_warning_and_more_a_log_line(caplog):
    with pytest.warns(UserWarning, match="Less than half of the body .*16 of 64"):
        Account(16, 64, {"frozen": 48}, {"frozen": "a"}).tell()
    with caplog.at_level(logging.INFO):
        Account(40, 64, {"frozen": 24}, {"frozen": "a"}).tell()
    assert "40 of 64 body weights compete" in caplog.text


def test_embeddings_that_were_not_asked_for_make_no_share_low():
    assert not Account(10, 100, {competition.EMBEDDING: 85, "frozen": 5}).is_low
    assert Account(10, 100, {competition.EMBEDDING: 75, "frozen": 15}).is_low


def test_frozen_weights_do_not_compete_under_any_rule():
    model = tiny.bert()
    model.bert.encoder.layer[0].requires_grad_(False)
    layers, account = competing_layers(model)
    assert {name.split(".")[3] for name in layers} == {"1"}
    assert account.left_out[competition.FROZEN] == account.competing


def test_a_model_in_which_nothing_trains_is_only_read():
    layers, _ = competing_layers(tiny.bert().requires_grad_(False))
    assert layers.keys() == competing_layers(tiny.bert())[0].keys()


def test_a_frozen_body_under_a_head_that_trains_is_refused_with_advice():
    model = tiny.bert()
    model.bert.requires_grad_(False)
    with pytest.raises(UnsupportedModelError, match=r"Nothing is left to slice. Unfreeze .* 0 of .* body weights"):
        competing_layers(model)


def test_a_model_without_a_known_layer_is_refused_with_its_account():
    with pytest.raises(LayerMismatchError, match=r"no weight that can be sliced .* 0 of 288 body weights"):
        competing_layers(nn.Sequential(nn.LSTM(1, 8)), head=())


@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_a_weight_computed_by_the_old_hooks_is_told_too(wrap):
    model = nn.Sequential(wrap(nn.Linear(4, 4)), nn.Linear(4, 4))
    layers, account = competing_layers(model, head=())
    assert list(layers) == ["1"]
    assert set(account.left_out) == {competition.UNRANKABLE}


def test_rules_without_a_profile_compete_over_what_ran():
    model = tiny.mlp()
    known = competing_layers(model, head=())[0]
    ran = {name: known[name] for name in ("0", "4")}
    with_profile, account = competing_layers(model, profile_of(ran))
    without, same = competing_layers(model, head=(), ran=ran)
    assert list(with_profile) == list(without) == ["0", "4"]
    assert account == same
    assert account.left_out == {competition.NEVER_RAN: 42}


def test_a_profile_of_embeddings_tied_to_the_head_lets_them_not_compete():
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=30, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0
        )
    )
    layers = {f"transformer.h.0.{name}": None for name in ("attn.c_attn", "mlp.c_fc")}
    found = competition.adapter_for(model, ()).layers(embeddings=True)
    profile = profile_of({name: found[name] for name in ("transformer.wte", *layers)})
    competing, account = competing_layers(model, profile)
    assert list(competing) == list(layers)
    assert account.left_out[competition.TIED] == 240


def test_a_profile_that_looked_into_the_head_lets_it_compete():
    model = tiny.bert()
    found = competition.adapter_for(model, ()).layers()
    assert "classifier" in competing_layers(model, profile_of(found))[0]


def test_experts_and_attention_without_modules_of_their_own_compete():
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
    _, account = competing_layers(transformers.GptOssForCausalLM(config))
    assert not account.is_low
    assert account.competing >= account.total - 20 * 8 - 3 * 8  # all but token rows and the router
    layers, account = competing_layers(nn.TransformerEncoderLayer(8, 2, 16), head=())
    assert account.share == 1
    assert list(layers) == ["self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2"]


def test_what_an_adapter_brought_is_told_apart():
    peft = pytest.importorskip("peft")
    model = tiny.bert()
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["query"]), model)
    with pytest.raises(UnsupportedModelError, match="of an adapter inside the model 128"):
        competing_layers(model)  # PEFT froze the teacher's weights
    model.requires_grad_(True)
    layers, account = competing_layers(model)
    assert layers.keys() == {name.replace("query", "query.base_layer") for name in competing_layers(tiny.bert())[0]}
    assert account.left_out[competition.ADAPTER] == 2 * 2 * (16 * 2)


def test_an_account_survives_json():
    account = competing_layers(Net(), head=("head",))[1]
    assert Account.from_dict(account.to_dict()) == account


@pytest.mark.parametrize(
    "change",
    [
        {"competing": -1},
        {"total": 10**9},
        {"total": "many"},
        {"competing": True},
        {"left_out": {"frozen": 1}},
        {"examples": {}},
        {"left_out": None},
    ],
)
def test_an_account_whose_numbers_cannot_be_is_refused(change):
    values = Account(16, 64, {"frozen": 48}, {"frozen": "a.weight"}).to_dict()
    with pytest.raises(ValueError, match="account"):
        Account.from_dict(values | change)
    with pytest.raises(ValueError, match="four fields"):
        Account.from_dict({})
