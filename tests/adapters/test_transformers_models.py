import pytest
import torch
from transformers import (
    BertModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
)

from remos_hf.activations import watch
from remos_hf.adapters.timm_models import ImageClassifier
from remos_hf.adapters.transformers_models import adapter_beside_head, adapter_for, with_new_head
from remos_hf.errors import UnsupportedModelError
from remos_hf.profiling.criteria import threshold_coverage
from remos_hf.profiling.data_pass import profile_coverage
from tests import reference, tiny


def resnet():
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic", num_labels=3)
    return _in_eval(ResNetForImageClassification, config)


def convnext():
    config = ConvNextConfig(hidden_sizes=[4, 6, 8, 8], depths=[1, 1, 1, 1], num_labels=3)
    return _in_eval(ConvNextForImageClassification, config)


def swin():
    config = SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4, num_labels=3
    )
    return _in_eval(SwinForImageClassification, config)


def _in_eval(kind, config):
    torch.manual_seed(0)
    model = kind(config)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)
    return model.eval()


@pytest.mark.parametrize(
    ("model", "head"),
    [
        (tiny.bert(), {"classifier", "dropout", "bert.pooler"}),
        (tiny.gpt2(), {"score"}),
        (tiny.llama(), {"lm_head"}),
        (tiny.bart(), {"classification_head"}),
        (tiny.vit(), {"classifier"}),
        (tiny.t5(), {"lm_head"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_head_is_what_lies_outside_the_body_and_the_pooler(model, head):
    adapter = adapter_for(model)
    assert set(adapter.head) == head
    assert not any(name.startswith(tuple(head)) for name in adapter.layers())


def test_a_head_beside_a_body_is_asked_of_whom_knows_it():
    for head in (None, ("classifier",), ()):
        assert adapter_beside_head(tiny.bert(), head).head == adapter_for(tiny.bert(), head).head
    wrapped = ImageClassifier(tiny.ConvNet(), ("head",))
    assert adapter_beside_head(wrapped).head == ("body.head",)
    assert adapter_beside_head(tiny.ConvNet(), ("head",)).head == ("head",)
    assert adapter_beside_head(tiny.ConvNet(), ()).head == ()
    with pytest.raises(UnsupportedModelError, match="ConvNet names no head"):
        adapter_beside_head(tiny.ConvNet())


def test_a_bare_body_has_only_its_pooler_as_head():
    assert adapter_for(BertModel(tiny.bert().config)).head == ("pooler",)


def test_the_layers_of_bert_are_its_encoder_matrices():
    layers = adapter_for(tiny.bert()).layers()
    # q, k, v, attention output, intermediate, output in 2 blocks of width 16 and 32
    assert len(layers) == 12
    assert sum(layer.weight.numel() for layer in layers.values()) == 2 * (4 * 16 * 16 + 2 * 16 * 32)


def test_only_the_word_embeddings_join_when_asked():
    added = set(adapter_for(tiny.bert()).layers(embeddings=True)) - set(adapter_for(tiny.bert()).layers())
    assert added == {"bert.embeddings.word_embeddings"}


def test_a_grouped_query_model_that_fuses_its_projections_is_cut_by_their_sizes():
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(
        vocab_size=tiny.VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    layers = adapter_for(Phi3ForCausalLM(config)).layers()
    assert layers["model.layers.0.self_attn.qkv_proj"].part_sizes == (16, 8, 8)


@pytest.mark.parametrize("model", [tiny.bert(), tiny.gpt2(), tiny.llama(), tiny.vit()], ids=lambda m: type(m).__name__)
def test_every_block_reads_and_writes_the_residual_stream(model):
    adapter = adapter_for(model)
    width = model.config.hidden_size
    for block in adapter.blocks():
        inside = [layer for name, layer in adapter.layers().items() if name.startswith(f"{block}.")]
        writers = [layer for layer in inside if adapter.writes_to_stream(layer)]
        readers = [layer for layer in inside if not adapter.writes_to_stream(layer)]
        assert len(writers) == 2  # attention output, MLP output
        assert all(layer.out_neurons == width for layer in writers)
        assert all(layer.in_neurons == width for layer in readers)


def test_fresh_weights_are_spread_like_transformers_starts_them():
    adapter = adapter_for(tiny.bert(hidden=64))
    layer = adapter.layers()["bert.encoder.layer.0.intermediate.dense"]
    fresh = adapter.fresh_weight(layer, torch.Generator().manual_seed(0))
    assert fresh.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    ("make", "feature"),
    [(resnet, "classifier.1"), (convnext, "classifier"), (swin, "classifier"), (tiny.vit, "classifier")],
)
def test_image_models_are_profiled_and_their_feature_gives_the_logits(make, feature):
    model = make()
    adapter = adapter_for(model)
    pixels = torch.randn(4, 3, 8 if make is tiny.vit else 32, 8 if make is tiny.vit else 32)
    profile = profile_coverage(model, [{"pixel_values": pixels}], criterion=threshold_coverage(0.4), progress=False)
    assert set(profile.input_counts) == set(adapter.layers())
    if make is not swin:  # whose windows the reference takes for samples
        expected = reference.brute_force_profile(model, adapter.layers(), [(pixels,)], "nc", 0.4)
        for (name, end), counts in expected.items():
            assert torch.equal(getattr(profile, f"{end}_counts")[name], counts), (name, end)
    assert adapter.feature_layer() == feature
    seen = {}
    with (
        torch.no_grad(),
        watch({"feature": model.get_submodule(feature)}, lambda _, given, made: seen.update(made=made)),
    ):
        assert torch.equal(model(pixels).logits, seen["made"])


def test_the_feature_layer_of_text_models_is_their_classifier_and_never_the_pooler():
    assert adapter_for(tiny.bert()).feature_layer() == "classifier"
    assert adapter_for(tiny.bart()).feature_layer() == "classification_head.out_proj"
    assert adapter_for(tiny.gpt2()).feature_layer() == "score"
    with pytest.raises(UnsupportedModelError, match="BertModel has no classifier"):
        adapter_for(BertModel(tiny.bert().config)).feature_layer()


@pytest.mark.parametrize("make", [tiny.bert, resnet], ids=lambda make: make.__name__)
def test_a_student_has_the_teachers_body_and_statistics_under_a_head_from_its_seed(make):
    teacher = make()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    state = torch.random.get_rng_state()
    student, again, other = (with_new_head(teacher, 5, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    after = student.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if not name.startswith("classifier"))
    weight = adapter_for(student).feature_layer() + ".weight"
    assert len(after[weight]) == 5
    assert torch.equal(after[weight], again.state_dict()[weight])
    assert not torch.equal(after[weight], other.state_dict()[weight])


def test_a_convolutional_model_has_no_embedding_rows():
    adapter = adapter_for(resnet())
    assert adapter.layers(embeddings=True).keys() == adapter.layers().keys()


def test_a_new_head_has_generic_names_or_those_given_never_the_teachers():
    teacher = tiny.bert()
    teacher.config.id2label, teacher.config.label2id = {0: "NEG", 1: "POS"}, {"NEG": 0, "POS": 1}
    generic = with_new_head(teacher, 2, seed=0).config
    assert (generic.id2label, generic.label2id) == ({0: "LABEL_0", 1: "LABEL_1"}, {"LABEL_0": 0, "LABEL_1": 1})
    named = with_new_head(teacher, 3, seed=0, labels=["cat", "dog", "owl"])
    assert named.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    assert named.config.num_labels == named.num_labels == 3
    assert teacher.config.id2label == {0: "NEG", 1: "POS"}


@pytest.mark.parametrize("labels", [["a"], ["a", "b", "c"], ["a", "a"]])
def test_names_that_do_not_fit_the_labels_are_refused(labels):
    with pytest.raises(ValueError, match="names each of the 2 labels once"):
        with_new_head(tiny.bert(), 2, seed=0, labels=labels)


def test_a_student_of_a_regression_teacher_learns_classes():
    student = with_new_head(tiny.bert(problem_type="regression"), 2, seed=0)
    assert student(**tiny.text_batches(1)[0]).loss.isfinite()
    assert student.config.problem_type == "single_label_classification"  # found by the loss itself
