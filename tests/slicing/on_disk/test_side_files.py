import json

import pytest

from remos_hf.errors import CorruptFileError
from remos_hf.slicing.on_disk.side_files import copy_side_file, side_files


def test_configs_and_tokenizers_come_along_and_nothing_that_runs(tmp_path):
    wanted = {"config.json", "vocab.txt", "spiece.model", "chat_template.jinja", "LICENSE", "merges.txt"}
    others = {"evil.py", "pytorch_model.bin", "trainer_state.json", "remos_config.json", ".hidden.json", "x.index.json"}
    for name in wanted | others:
        (tmp_path / name).write_text("{}")
    assert {path.name for path in side_files(tmp_path)} == wanted


@pytest.mark.parametrize("content", ['{"a": 1}', "[1]", '[{"path": 3}, {"path": "../out"}, {"path": "missing"}]', "{"])
def test_a_list_of_modules_leads_nowhere_else(tmp_path, content):
    (tmp_path / "modules.json").write_text(content)
    if content.startswith('[{"path"'):
        assert [path.name for path in side_files(tmp_path)] == ["modules.json"]
    else:
        with pytest.raises(CorruptFileError, match=r"modules\.json"):
            side_files(tmp_path)


def test_a_config_is_copied_byte_for_byte_but_for_its_programs(tmp_path):
    (tmp_path / "config.json").write_text('{"a":  1}')
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.T", null]}, "b": 2}')
    copy_side_file(tmp_path / "config.json", tmp_path / "out" / "config.json")
    copy_side_file(tmp_path / "tokenizer_config.json", tmp_path / "out" / "tokenizer_config.json")
    assert (tmp_path / "out" / "config.json").read_text() == '{"a":  1}'
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {"b": 2}
