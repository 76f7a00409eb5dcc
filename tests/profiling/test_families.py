"""Profiles of many kinds of models against brute force: one sample at a time, unpadded, every product looked at."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

from remos_hf.activations import without_fast_path
from remos_hf.adapters.transformers_models import adapter_for
from remos_hf.profiling.criteria import threshold_coverage
from remos_hf.profiling.data_pass import profile_coverage
from tests import reference, tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*never covered.*:UserWarning")

WORDS = {"vocab_size": tiny.VOCABULARY, "pad_token_id": 0}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
DECODER = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 64}


def seeded(make):
    torch.manual_seed(0)
    return make().eval()


def of(name, config, **options):
    kind = getattr(transformers, f"{name}", None)
    return lambda: seeded(lambda: kind(getattr(transformers, config)(**options)))


def unpadded(batch):
    """Each sample of a batch alone, without its padding."""
    for row, mask in enumerate(batch["attention_mask"]):
        kept = mask.bool()
        yield {key: batch[key][row : row + 1, kept] for key in ("input_ids",)}


def by_row(batch):
    """Each sample of a batch alone, as it is."""
    samples = len(next(iter(batch.values())))
    for row in range(samples):
        yield {key: value[row : row + 1] for key, value in batch.items() if key != "labels"}


def images():
    return [{"pixel_values": pixels} for pixels, _ in tiny.image_batches(pixels=32)]


def choices():
    batches = []
    for batch in tiny.text_batches(count=2, size=6, length=7):
        batches.append({key: batch[key].view(2, 3, 7) for key in ("input_ids", "attention_mask")})
    return batches


def each_choice(batch):
    """The choices of a sample run one by one; together they are the sample."""
    for ids, masks in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        yield [{"input_ids": one[None, None, mask.bool()]} for one, mask in zip(ids, masks, strict=True)]


def text_and_images():
    batches = tiny.text_batches(size=4, length=5)  # as many positions as the images have
    return [
        {**batch, **image} for batch, image in zip(batches, images(), strict=True) if batch.pop("labels") is not None
    ]


def text_and_image(batch):
    for row, mask in enumerate(batch["attention_mask"]):
        ids = batch["input_ids"][row : row + 1, mask.bool()]
        yield {"input_ids": ids, "pixel_values": batch["pixel_values"][row : row + 1]}


def pairs():
    batches = tiny.text_batches(length=8)
    for batch, target in zip(batches, tiny.text_batches(length=5, seed=7), strict=True):
        batch["labels"] = target["input_ids"].masked_fill(target["attention_mask"] == 0, -100)
    return batches


def pair(batch):
    for row, mask in enumerate(batch["attention_mask"]):
        labels = batch["labels"][row]
        yield {"input_ids": batch["input_ids"][row : row + 1, mask.bool()], "labels": labels[labels != -100][None]}


LENGTHS = ((3, 5, 2), (4, 6))


def packed():
    generator = torch.Generator().manual_seed(4)
    batches = []
    for lengths in LENGTHS:
        places = torch.cat([torch.arange(length) for length in lengths])[None]
        ids = torch.randint(3, tiny.VOCABULARY, places.shape, generator=generator)
        batches.append({"input_ids": ids, "position_ids": places})
    return batches


def each_packed(batch):
    starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    for start, stop in zip(starts, [*starts[1:], batch["input_ids"].shape[1]], strict=True):
        yield {"input_ids": batch["input_ids"][:, start:stop]}


def sounds():
    generator = torch.Generator().manual_seed(5)
    batches = []
    for lengths in ((400, 300), (350, 390)):
        mask = torch.arange(400)[None] < torch.tensor(lengths)[:, None]
        batches.append({"input_values": torch.randn(2, 400, generator=generator) * mask, "attention_mask": mask.long()})
    return batches


def each_sound(batch):
    for row, mask in enumerate(batch["attention_mask"]):
        yield {"input_values": batch["input_values"][row : row + 1, mask.bool()]}


class Vision(nn.Module):
    """A ViT of torch's own layers, which call neither their packed projections nor their out_proj as modules."""

    def __init__(self, samples_first):
        super().__init__()
        self.samples_first = samples_first
        self.patches = nn.Conv2d(3, 16, 8, stride=8)
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=samples_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 2)

    def forward(self, pixel_values):
        tokens = self.patches(pixel_values).flatten(2)
        tokens = tokens.transpose(1, 2) if self.samples_first else tokens.permute(2, 0, 1)
        return self.head(self.encoder(tokens).mean(1 if self.samples_first else 0))


class CrossAttending(nn.Module):
    """Attends from a few queries to what is read, whose width differs."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(3, 8))
        self.attention = nn.MultiheadAttention(8, 2, kdim=16, vdim=16, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, pixel_values):
        read = pixel_values.flatten(2).transpose(1, 2).repeat(1, 1, 6)[..., :16]
        return self.head(self.attention(self.queries.expand(len(read), -1, -1), read, read)[0].mean(1))


class Routed(nn.Module):
    """Every token goes to one of two experts, which see (tokens, features)."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(tiny.VOCABULARY, 16)
        self.experts = nn.ModuleList(nn.Linear(16, 12) for _ in range(2))
        self.head = nn.Linear(12, 2)

    def forward(self, input_ids, attention_mask=None):
        hidden = self.tokens(input_ids)
        rows = hidden.flatten(0, 1)
        chosen, made = (rows[:, 0] > 0).long(), rows.new_zeros(len(rows), 12)
        for number, expert in enumerate(self.experts):
            mine = chosen == number
            if mine.any():
                made[mine] = expert(rows[mine])
        return self.head(made.view(*input_ids.shape, -1).mean(1))


def without_labels(batch):
    return {key: value for key, value in batch.items() if key != "labels"}


def small(batch):
    return {key: value.where(value < 0, value % 30) for key, value in batch.items()}


@dataclass
class Family:
    make: object
    batches: object = tiny.text_batches
    alone: object = unpadded
    padded: bool = False  # padding changes what real positions hold, so the reference runs padded too
    tables: tuple = ()  # layers that also run on relative positions, and which of their calls is the first to
    head: tuple = None


FAMILIES = {
    "bert": Family(tiny.bert),
    "roberta": Family(of("RobertaForSequenceClassification", "RobertaConfig", **WORDS, **SMALL)),
    "distilbert": Family(
        of(
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            **WORDS,
            dim=16,
            n_layers=2,
            n_heads=2,
            hidden_dim=24,
        )
    ),
    "albert": Family(of("AlbertForSequenceClassification", "AlbertConfig", **WORDS, **SMALL, embedding_size=8)),
    "electra": Family(of("ElectraForSequenceClassification", "ElectraConfig", **WORDS, **SMALL, embedding_size=8)),
    "deberta": Family(
        of(
            "DebertaForSequenceClassification",
            "DebertaConfig",
            **WORDS,
            **SMALL,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            max_relative_positions=8,
        ),
        tables=(("pos_proj", 0), ("pos_q_proj", 0)),
    ),
    "deberta v2": Family(
        of(
            "DebertaV2ForSequenceClassification",
            "DebertaV2Config",
            **WORDS,
            **SMALL,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            share_att_key=True,
            position_buckets=4,
            max_relative_positions=8,
            conv_kernel_size=3,
            conv_act="gelu",
        ),
        padded=True,
        tables=(("query_proj", 1), ("key_proj", 1)),
    ),
    "squeezebert": Family(
        of(
            "SqueezeBertForSequenceClassification",
            "SqueezeBertConfig",
            **WORDS,
            **SMALL,
            embedding_size=16,
            q_groups=2,
            k_groups=2,
            v_groups=2,
            post_attention_groups=1,
            intermediate_groups=2,
            output_groups=2,
        ),
    ),
    "convbert": Family(
        of(
            "ConvBertForSequenceClassification",
            "ConvBertConfig",
            **WORDS,
            **SMALL,
            embedding_size=16,
            conv_kernel_size=3,
            head_ratio=1,
        ),
        padded=True,
    ),
    "xlnet": Family(
        of("XLNetForSequenceClassification", "XLNetConfig", **WORDS, d_model=16, n_layer=2, n_head=2, d_inner=24),
        partial(tiny.text_batches, size=9, length=9),  # square: the axes cannot be told apart by their sizes
    ),
    "gpt2": Family(tiny.gpt2),
    "llama padded on the left": Family(tiny.llama, partial(tiny.text_batches, left=True)),
    "t5": Family(
        of(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=30,
            decoder_start_token_id=0,
            d_model=8,
            d_kv=4,
            d_ff=12,
            num_layers=1,
            num_heads=2,
        ),
        lambda: [small(batch) for batch in pairs()],
        pair,
    ),
    "bart": Family(lambda: seeded(lambda: transformers.BartForConditionalGeneration(tiny.bart().config)), pairs, pair),
    "bart that makes its decoder's input itself": Family(
        lambda: tiny.bart().model, lambda: [without_labels(batch) for batch in tiny.text_batches()]
    ),
    "vit": Family(tiny.vit, lambda: [{"pixel_values": pixels} for pixels, _ in tiny.image_batches()], by_row),
    "swin": Family(
        of(
            "SwinForImageClassification",
            "SwinConfig",
            image_size=32,
            patch_size=4,
            embed_dim=8,
            depths=[1, 1],
            num_heads=[2, 2],
            window_size=4,
        ),
        images,
        by_row,
    ),
    "clip": Family(
        of(
            "CLIPModel",
            "CLIPConfig",
            text_config={**WORDS, **SMALL, "max_position_embeddings": 20, "eos_token_id": 2, "bos_token_id": 1},
            vision_config={**SMALL, "image_size": 32, "patch_size": 16},
            projection_dim=8,
        ),
        text_and_images,
        text_and_image,
    ),
    "mixtral": Family(
        of(
            "MixtralForSequenceClassification",
            "MixtralConfig",
            **WORDS,
            **DECODER,
            num_local_experts=4,
            num_experts_per_tok=2,
        )
    ),
    "qwen3 moe": Family(
        of(
            "Qwen3MoeForSequenceClassification",
            "Qwen3MoeConfig",
            **WORDS,
            **DECODER,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=12,
            head_dim=8,
        )
    ),
    "routed tokens": Family(Routed, head=("head",)),
    "torch's transformer": Family(partial(Vision, True), images, by_row, head=("head",)),
    "torch's transformer, positions first": Family(partial(Vision, False), images, by_row, head=("head",)),
    "torch's cross-attention": Family(CrossAttending, images, by_row, head=("head",)),
    "grouped convolutions": Family(
        tiny.ConvNet, lambda: [{"pixel_values": pixels} for pixels, _ in tiny.image_batches()], by_row
    ),
    "multiple choice": Family(
        lambda: seeded(lambda: transformers.BertForMultipleChoice(tiny.bert().config)), choices, each_choice
    ),
    "packed rows": Family(tiny.llama, packed, each_packed),
    "sounds": Family(
        of(
            "Wav2Vec2Model",
            "Wav2Vec2Config",
            **SMALL,
            conv_dim=(8, 8),
            conv_kernel=(10, 3),
            conv_stride=(5, 2),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
        ),
        sounds,
        each_sound,
    ),
}


def products(monkeypatch):
    """Note every product with a weight: (weight, what it read, what it made). Whoever calls it, module or function."""
    noted = []

    def noting(function, weight_at, read_at):
        def call(*args, **kwargs):
            made = function(*args, **kwargs)
            noted.append((args[weight_at], args[read_at].clone(), made.clone()))
            return made

        return call

    monkeypatch.setattr(functional, "linear", noting(functional.linear, 1, 0))
    monkeypatch.setattr(functional, "conv1d", noting(functional.conv1d, 1, 0))
    monkeypatch.setattr(functional, "conv2d", noting(functional.conv2d, 1, 0))
    monkeypatch.setattr(torch, "addmm", noting(torch.addmm, 2, 1))
    return noted


def place(weight):
    return weight.data_ptr(), weight.numel()


def vectors(layer, values, mask):
    """What one end of a layer held for a sample, as (positions, neurons)."""
    if layer.neuron_axis == 1:
        values = values.movedim(1, -1)
    if mask is not None:
        values = values[:, mask] if values.shape[1] == len(mask) else values
    return values.reshape(-1, values.shape[-1]).numpy()


def count_by_hand(family, model, layers, batches, noted, threshold):
    owners = {place(layer.weight): layer for layer in layers.values()}
    counts = {(name, end): 0 for name in layers for end in ("input", "output")}
    for batch in batches:
        samples = by_row(batch) if family.padded else family.alone(batch)
        for number, sample in enumerate(samples):
            mask = batch["attention_mask"][number].bool() if family.padded else None
            noted.clear()
            with torch.no_grad(), adapter_for(model, family.head).plain_experts(), without_fast_path():
                for run in sample if isinstance(sample, list) else [sample]:
                    model(**run)
            held = {}
            for weight, read, made in noted:
                layer = owners.get(place(weight))
                if layer is None or on_table(family, layer.name, len(held.get((layer.name, "input", 0), ()))):
                    continue
                held.setdefault((layer.name, "input", 0), []).append(vectors(layer, read, mask))
                for part, values in enumerate(layer.split_parts(made)):
                    held.setdefault((layer.name, "output", part), []).append(vectors(layer, values, mask))
            for (name, end), rows in covered_ends(layers, held, threshold, isinstance(sample, list)).items():
                counts[name, end] = counts[name, end] + rows
    return counts


def on_table(family, name, calls):
    return any(name.endswith(last) and calls >= first for last, first in family.tables)


def covered_ends(layers, held, threshold, together):
    parts = {}
    for (name, end, part), calls in held.items():
        width = calls[0].shape[-1]
        calls = [np.concatenate(calls)] if together else calls
        covered = [reference.covered(reference.scaled_means(call, -1), "nc", threshold) for call in calls]
        rows = np.any([np.zeros(width, bool) if one is None else one for one in covered], axis=0)
        parts.setdefault((name, end), []).append((part, torch.from_numpy(rows)))
    return {
        (name, end): layers[name].join_parts([rows[None] for _, rows in sorted(some, key=lambda one: one[0])])[0].long()
        if len(some) > 1
        else some[0][1].long()
        for (name, end), some in parts.items()
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_counted_as_by_hand(name, monkeypatch):
    family = FAMILIES[name]
    model, batches = family.make().eval(), family.batches()
    adapter = adapter_for(model, family.head)
    noted = products(monkeypatch)
    expected = count_by_hand(family, model, adapter.layers(), batches, noted, 0.45)
    monkeypatch.undo()
    profile = profile_coverage(model, batches, criterion=threshold_coverage(0.45), head=family.head)
    ran = {key for key, counts in expected.items() if isinstance(counts, torch.Tensor)}
    assert {name for name, _ in ran} == set(profile.input_counts)
    assert len(ran) > 2
    for layer, end in ran:
        assert getattr(profile, f"{end}_counts")[layer].tolist() == expected[layer, end].tolist(), (layer, end)


@pytest.mark.parametrize("name", FAMILIES)
def test_how_samples_are_cut_into_batches_changes_no_count(name):
    family = FAMILIES[name]
    model, batches = family.make().eval(), family.batches()
    whole = profile_coverage(model, batches, head=family.head)
    if name == "packed rows":
        single = [batch for packed_batch in batches for batch in each_packed(packed_batch)]
    else:
        single = [
            {key: value[row : row + 1] for key, value in batch.items()}
            for batch in reversed(batches)
            for row in range(len(next(iter(batch.values()))))
        ]
    alone = profile_coverage(model, single, head=family.head)
    assert alone.num_samples == whole.num_samples
    assert whole.input_counts.keys() == alone.input_counts.keys()
    for layer, counts in whole.input_counts.items():
        assert torch.equal(counts, alone.input_counts[layer]), layer
        assert torch.equal(whole.output_counts[layer], alone.output_counts[layer]), layer
