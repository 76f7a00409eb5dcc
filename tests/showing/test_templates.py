import pytest
from jinja2 import UndefinedError

from remos_hf.showing.templates import environment


def test_anyones_text_is_escaped_and_what_is_missing_is_an_error():
    made = environment()
    assert made.from_string("{{ one }}").render(one="<b>") == "&lt;b&gt;"
    with pytest.raises(UndefinedError):
        made.from_string("{{ one }}").render()


def test_no_line_ends_inside_an_interval():
    told = environment().from_string("{{ one | together }}").render(one="3.0 [1.0, 5.0] (2.0, 4.0)")
    assert told.replace("\N{NO-BREAK SPACE}", "_") == "3.0 [1.0,_5.0] (2.0,_4.0)"
