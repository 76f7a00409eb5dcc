"""Small models built from configs, and batches for them. Nothing is downloaded."""

import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from remos_hf.strategies.student_data import StudentData

VOCABULARY = 60


def bert(seed=0, layers=2, hidden=16, **options):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        max_position_embeddings=32,
        num_labels=2,
        **options,
    )
    return BertForSequenceClassification(config).eval()


def gpt2(seed=0):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, num_labels=2, pad_token_id=0
    )
    return GPT2ForSequenceClassification(config).eval()


def bloom(seed=0):
    torch.manual_seed(seed)
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=4, num_labels=2, pad_token_id=0)
    return BloomForSequenceClassification(config).eval()


def llama(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config).eval()


def bart(seed=0):
    torch.manual_seed(seed)
    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=32,
        num_labels=2,
    )
    return BartForSequenceClassification(config).eval()


def t5(seed=0):
    torch.manual_seed(seed)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=30, num_labels=2, **sizes)).eval()


def vit(seed=0):
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    return ViTForImageClassification(config).eval()


class ConvNet(nn.Module):
    """A residual block, a depthwise and a grouped convolution, an in-place ReLU, a head."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 12, 1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.grouped = nn.Conv2d(12, 6, 1, groups=3)
        self.head = nn.Linear(6, 4)

    def forward(self, pixel_values):
        hidden = self.relu(self.norm(self.stem(pixel_values)))
        hidden = hidden + self.relu(self.conv(hidden))
        hidden = self.grouped(self.relu(self.depthwise(self.down(hidden))))
        return self.head(hidden.mean((2, 3)))


def mlp(seed=0, sizes=(5, 7, 6, 3)):
    torch.manual_seed(seed)
    layers = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
    return nn.Sequential(*[module for layer in layers for module in (layer, nn.ReLU())][:-1])


def text_batches(count=3, size=4, length=9, seed=1, left=False, padded=True):
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(3, VOCABULARY, (size, length), generator=generator)
        lengths = torch.randint(2, length + 1, (size,), generator=generator) if padded else torch.full((size,), length)
        real = torch.arange(length)[None] < lengths[:, None]
        if left:
            real = real.flip(1)
        labels = torch.randint(0, 2, (size,), generator=generator)
        batches.append({"input_ids": ids * real, "attention_mask": real.long(), "labels": labels})
    return batches


def student_data(batches=text_batches, **options):
    """The data of a student, whatever number of samples is asked for."""
    return StudentData(lambda samples: batches(), **options)


def image_batches(count=3, size=4, seed=1, pixels=8):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 3, pixels, pixels, generator=generator), torch.zeros(size)) for _ in range(count)]


def dataset(samples=24, seed=3, length=9):
    """Tokenised sentences of unequal length with labels, as a list that Trainer takes."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(samples):
        size = int(torch.randint(3, length + 1, (1,), generator=generator))
        ids = torch.randint(3, VOCABULARY, (size,), generator=generator).tolist()
        rows.append({"input_ids": ids, "attention_mask": [1] * size, "labels": ids[0] % 2})
    return rows


def pad(rows):
    """Collate rows of `dataset` to the longest one."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(key):
        return torch.tensor([row[key] + [0] * (longest - len(row[key])) for row in rows])

    labels = torch.tensor([row["labels"] for row in rows])
    return {"input_ids": padded("input_ids"), "attention_mask": padded("attention_mask"), "labels": labels}
