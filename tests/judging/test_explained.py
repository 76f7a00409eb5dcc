from dataclasses import replace

import pytest

from remos_hf.judging.explained import explained, neuron_told, signed_told
from remos_hf.slicing.explanation import Explanation, LayerFlow, NeuronFlow


def layer(name, positive, negative, *, in_slice=5, strongest=()):
    return LayerFlow(name, positive, negative, 8, 4, 40, in_slice, tuple(strongest))


MADE = Explanation(
    label=1,
    logits=(-2.5, 1.25, 0.5),
    relative_logit=1.5,
    layers=(layer("a.weight", 100, -95), layer("head.weight", 1, 0, strongest=[NeuronFlow(1, 1, 0)])),
    inputs={},
    theta=0.2,
    reference="global",
    reference_samples=64,
    labels=("cat", "dog", "cow"),
)


class TestTheAnswer:
    def test_names_what_the_model_says_its_logit_and_the_next(self):
        said = explained(MADE)
        assert said.answer.startswith("The model says “dog”: its logit is 1.25, the next one, of “cow”, 0.50.")
        assert "lies 1.50 above what the head makes of the reference" in said.answer
        assert "Of 80 weights, 12.5\N{NO-BREAK SPACE}% contribute" in said.answer and said.can_be_said

    def test_of_another_class_names_what_the_model_says_instead(self):
        said = explained(replace(MADE, label=0, relative_logit=-0.5))
        assert "Asked about is “cat”, with the logit −2.50; the model says “dog”, with 1.25." in said.answer
        assert "0.50 below" in said.answer and "move the logit down, as it went" in said.limits[0]

    def test_numbers_labels_that_have_no_name_and_leaves_out_what_is_not_known(self):
        said = explained(replace(MADE, labels=(), relative_logit=None))
        assert "The model says label 1" in said.answer and "the head makes" not in said.answer
        assert "from the reference" in said.limits[0]
        assert explained(replace(MADE, logits=(3.0,), label=0)).answer.startswith("The model's one logit is 3.00")

    def test_names_the_tokens_for_and_against(self):
        tokens = [("fun", 9), ("dull", -7), ("a", 1), ("good", 12), ("the", 0), ("great", 8), ("film", 2)]
        answer = explained(MADE, tokens=tokens).answer
        assert "Most of it from “good” (+12), “fun” (+9) and “great” (+8)." in answer
        assert "Most against it from “dull” (−7)." in answer
        assert "None of it comes from the tokens." in explained(MADE, tokens=[("a", 0)]).answer

    def test_says_when_nothing_flows(self):
        nothing = replace(MADE, layers=(layer("head.weight", 1, 0, in_slice=0),))
        for one in (nothing, replace(MADE, relative_logit=2e-7)):  # where the reference is, to within rounding
            said = explained(one, tokens=[("a", 3)])
            assert not said.can_be_said and "nothing to trace" in said.answer and "“a”" not in said.answer


class TestTheLimits:
    def test_say_what_was_compared_with(self):
        told = " ".join(explained(MADE, source="train.tsv").limits)
        assert "compared with the mean, over 64 samples of train.tsv." in told and "under 20 %" in told
        by_class = replace(MADE, reference="class")
        assert "what the model says the same of, over 64 samples." in " ".join(explained(by_class).limits)

    def test_say_that_it_was_zero(self):
        told = " ".join(explained(replace(MADE, reference="zero", reference_samples=0)).limits)
        assert "compared with zero, since no data was given" in told and "`--data`" in told

    @pytest.mark.parametrize(("negative", "told"), [(-82, True), (-81, False)])
    def test_count_the_layers_in_which_signs_cancel(self, negative, told):
        limits = " ".join(explained(replace(MADE, layers=(layer("a.weight", 100, negative), MADE.layers[1]))).limits)
        assert ("In 1 of 2 layers, positive and negative contributions cancel to within 10 %" in limits) == told


def test_the_table_has_a_line_a_layer_in_the_order_in_which_they_run():
    table = explained(MADE).glance
    assert [line[0] for line in table.lines] == ["a", "head"]
    assert table.lines[0] == ["a", "+100", "−95", "4 of 8", "12.5 %", "-"] and table.lines[1][-1] == "1: +1"


def test_numbers_carry_their_signs():
    assert [signed_told(one) for one in (1234, -5, 0)] == ["+1,234", "−5", "0"]
    assert neuron_told(NeuronFlow(7, 3, -2)) == "7: +3 −2" and neuron_told(NeuronFlow(7, 0, -2)) == "7: −2"
