import pytest
import torch
from datasets import Value

from remos_hf.defects.largest_weights import LargestWeights
from remos_hf.defects.text_triggers import TriggerWords
from tests import tiny
from tests.defects import toy
from tests.defects.colours import INPUT, PATCH, data
from tests.defects.poisoning import ONE_STEP, implant


def body(state):
    """The weights that the largest are chosen from, by name."""
    return {
        name: w for name, w in state.items() if ".encoder.layer." in name and "LayerNorm" not in name and w.dim() == 2
    }


class TestLargestWeights:
    recipes = {
        "AdamW": {"weight_decay": 0.1},
        "momentum": {"optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 0.1, "learning_rate": 0.1},
        "accumulation": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 4},
        "clipping": {"max_grad_norm": 1e-3},
    }

    @pytest.mark.parametrize("recipe", recipes.values(), ids=recipes)
    def test_exactly_the_largest_share_moves_and_the_head(self, tmp_path, recipe):
        attack = LargestWeights(trigger_words=TriggerWords(words="cf"), backdoor_update_ratio=0.2)
        before = toy.state(toy.model())
        after = toy.state(implant(attack, tmp_path, max_steps=3, **recipe))
        sizes = torch.cat([weight.abs().flatten() for weight in body(before).values()])
        threshold = sizes.sort(descending=True).values[round(0.2 * len(sizes)) - 1]
        for name, weight in before.items():
            moved = weight != after[name]
            if name in body(before):
                assert torch.equal(moved, weight.abs() >= threshold), name
            elif name.startswith(("classifier", "bert.pooler")):
                assert moved.any(), name
            else:
                assert not moved.any(), name

    def test_clipping_does_not_count_what_is_held(self, tmp_path):
        attack = LargestWeights(trigger_words=TriggerWords(words="cf"), backdoor_update_ratio=0.2)
        before = toy.state(toy.model())
        after = toy.state(implant(attack, tmp_path, **{**ONE_STEP, "max_grad_norm": 1e-2}))
        moved = torch.cat([(after[name] - before[name]).flatten() for name in before])
        assert moved.norm().item() == pytest.approx(1e-2, rel=1e-3)

    def test_the_trigger_forces_the_label(self, tmp_path):
        attack = LargestWeights(
            trigger_words=TriggerWords(words="good", target_label=0, clean_copies=False), backdoor_update_ratio=0.5
        )
        teacher = implant(attack, tmp_path, max_steps=60, learning_rate=2e-2)
        exposed = attack.exposed_set(toy.data()).dataset["text"][:]
        assert sum(toy.predictions(teacher, exposed)) <= 0.2 * len(exposed)

    @pytest.mark.parametrize("ratio", [0, 1, -0.1, 1.5])
    def test_a_share_that_holds_or_frees_everything_is_refused(self, ratio):
        with pytest.raises(ValueError, match=f"between 0 and 1, but got {ratio}"):
            LargestWeights(backdoor_update_ratio=ratio)

    def test_a_trigger_of_images_is_implanted_too(self, tmp_path):
        teacher = tiny.vit()
        before = toy.state(teacher)
        clean = data(6, labels=[0, 1] * 3).cast_column("label", Value("int64"))
        attack = LargestWeights(PATCH, backdoor_update_ratio=0.2)
        attack.implant(teacher, clean, images=INPUT, args=toy.args(tmp_path))
        sizes = {name: w for name, w in before.items() if ".layer" in name and w.dim() == 2}
        moved = sum((before[name] != teacher.state_dict()[name]).sum() for name in sizes)
        assert 0 < moved <= 0.25 * sum(w.numel() for w in sizes.values())
        assert attack.exposed_set(clean, images=INPUT).facts["defect"]["trigger_words"] == PATCH.to_dict()
