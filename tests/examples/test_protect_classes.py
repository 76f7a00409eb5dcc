import json

import torch
from safetensors.torch import load_model

from remos_hf import HiddenWeights
from tests.examples.test_prune_classes import example


def test_smoke_attacks_every_choice_and_hidden_weights_make_the_model_whole(tmp_path):
    protecting = example("protect_classes")
    args = protecting.parse_args(["--smoke", "--output_dir", str(tmp_path)])
    protecting.main(args)
    report = json.loads((tmp_path / "protect_classes.json").read_text())
    found = {(cell["method"], cell["budget"]): cell for cell in report["cells"]}
    assert set(found) == {(method, budget) for method in protecting.METHODS for budget in (0, 100)}
    assert (tmp_path / "protect_classes.png").read_bytes().startswith(b"\x89PNG")
    whole = protecting.trained(protecting.digits(0)[0], 0, args.epochs).state_dict()
    for method in protecting.METHODS:
        given_away = protecting.DigitNet()
        load_model(given_away, str(tmp_path / method / "model.safetensors"))
        assert not all(torch.equal(one, whole[name]) for name, one in given_away.state_dict().items())
        HiddenWeights.from_pretrained(tmp_path / method / "kept_apart").put_back(given_away)
        assert all(torch.equal(one, whole[name]) for name, one in given_away.state_dict().items())
