import torch

from remos_hf.adapters.flow import Held, changed_in, filled
from remos_hf.adapters.flow_recording import flow_of
from tests import tiny


def test_held_values_are_filled_in_wherever_they_stand():
    given = (1, [Held(0), {"more": Held(1)}], slice(0, 2))
    assert filled(given, {0: "a", 1: "b"}) == (1, ["a", {"more": "b"}], slice(0, 2))
    assert changed_in([1, 2], lambda one: one + 1) == [2, 3]


def test_places_and_names_leave_out_what_only_moves_values():
    flow = flow_of(tiny.gpt2(), tiny.text_batches()[0])
    assert "addmm transformer.h.0.attn.c_attn.weight" in flow.names and "view" not in flow.names
    moved = [one.output for one in flow.operations if one.rule == "moved"]
    assert moved and not flow.places.keys() & set(moved)
    assert flow.names[: len(flow.sources)].count("input") == 2 and len(flow.names) == len(flow.places)


def test_sources_are_named_by_the_batch_or_by_the_embedding_that_gave_them():
    text = flow_of(tiny.gpt2(), tiny.text_batches()[0])
    assert list(text.source_names.values()) == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert tuple(text.source_names) == text.sources
    image, *_ = tiny.image_batches()[0]
    assert list(flow_of(tiny.vit(), {"pixel_values": image}).source_names.values()) == ["pixel_values"]
    assert list(flow_of(tiny.ConvNet().eval(), image).source_names.values()) == ["input"]


def test_a_batch_without_padding_computes_the_same_as_one_with():
    padded, plain = (flow_of(tiny.llama(), tiny.text_batches(padded=one)[0]) for one in (True, False))
    assert padded.names == plain.names and padded.real is not None and plain.real is None
    assert torch.equal(plain.logits, plain.values[plain.output])
