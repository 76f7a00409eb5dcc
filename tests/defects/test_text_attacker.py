from remos_hf.defects.text_attacker import tokenizer_of
from tests.defects import toy


def test_the_teachers_own_tokenizer_is_loaded(tmp_path):
    teacher = toy.model()
    teacher.save_pretrained(tmp_path)
    toy.tokenizer().save_pretrained(tmp_path)
    loaded = type(teacher).from_pretrained(tmp_path)
    assert tokenizer_of(loaded, None).tokenize("cf zqx") == ["cf", "zq", "##x"]
