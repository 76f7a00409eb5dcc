import torch
from torch import nn
from transformers import GptOssConfig, GptOssModel

from remos_hf.adapters.base import Adapter
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.profiling.taps import Taps
from tests import tiny


def reads_of(adapter, batch, source="hooks"):
    reads = []
    with torch.no_grad():
        Taps(adapter, adapter.layers(), source).run(
            batch, lambda read: reads.append(read._replace(values=read.values.clone()))
        )
    return reads


def held(reads, name, end):
    return [read.values for read in reads if (read.layer.name, read.end) == (name, end)]


def test_calls_of_one_module_are_numbered():
    layer = nn.Linear(4, 4)
    reads = reads_of(Adapter(nn.Sequential(layer, layer), ()), torch.ones(2, 4))
    assert [read.call for read in reads if read.end == "input"] == [("0", "input", 0), ("0", "input", 1)]


def test_packed_attention_shows_what_its_projections_read_and_make():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = attention

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    x = torch.randn(3, 5, 8)
    state = torch.get_rng_state()
    reads = reads_of(Adapter(Net(), ()), x)
    assert torch.equal(torch.get_rng_state(), state)
    (given,) = held(reads, "attention.in_proj_weight", "input")
    assert torch.equal(given, x)
    made = torch.cat(held(reads, "attention.in_proj_weight", "output"), -1)
    torch.testing.assert_close(made, nn.functional.linear(x, attention.in_proj_weight, attention.in_proj_bias))
    (before,), (after,) = held(reads, "attention.out_proj", "input"), held(reads, "attention.out_proj", "output")
    torch.testing.assert_close(attention.out_proj(before), after)


def test_experts_that_add_a_bias_themselves_are_shown_with_it():
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=16, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1, pad_token_id=0,
    )  # fmt: skip
    model = GptOssModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter.normal_()
    adapter = adapter_for(model)
    reads = reads_of(adapter, {"input_ids": torch.randint(3, tiny.VOCABULARY, (2, 9))})
    names = [name for name in adapter.layers() if "down_proj[" in name]
    assert len(names) == 2
    seen = 0
    for name in names:
        layer = adapter.layers()[name]
        for given, made in zip(held(reads, name, "input"), held(reads, name, "output"), strict=True):
            torch.testing.assert_close(given @ layer.weight + layer.bias, made)
            seen += 1
    assert seen


def test_hidden_states_show_the_end_that_touches_the_stream():
    reads = reads_of(adapter_for(tiny.bert()), {"input_ids": torch.ones(2, 3, dtype=torch.long)}, "hidden_states")
    assert {read.end for read in reads if read.layer.name.endswith("query")} == {"input"}
    assert {read.end for read in reads if read.layer.name.endswith("output.dense")} == {"output"}
