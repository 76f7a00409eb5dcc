from dataclasses import fields

import pytest
from typer import BadParameter

from remos_hf.cli.explain_options import ExplainOptions, _theta


def test_every_option_has_a_help_and_the_command_a_sentence():
    assert ExplainOptions.__doc__.strip()
    for one in fields(ExplainOptions):
        (told,) = one.type.__metadata__
        assert told.help, one.name


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"text_columns": ["a"]}, "--text-column"),
        ({"reference": "class"}, "--reference"),
        ({"max_samples": 9}, "--max-samples"),
        ({"batch_size": 9}, "--batch-size"),
        ({"seed": 9}, "--seed"),
    ],
)
def test_what_is_about_data_wants_data(given, told):
    with pytest.raises(BadParameter, match=f"{told} is about --data"):
        ExplainOptions("model", "input", "out", **given)
    assert ExplainOptions("model", "input", "out", data="d", **given).data == "d"


def test_theta_is_read_or_refused():
    assert (_theta("0"), _theta("0.5")) == (0.0, 0.5)
    for text in ("1", "-0.1", "nan", "most"):
        with pytest.raises(BadParameter, match=text):
            _theta(text)
