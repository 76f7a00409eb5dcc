import pytest
import torch

from remos_hf.errors import NonFiniteError, RemosError
from remos_hf.judging.suspects import NONE_FOUND, SUSPICIOUS, verdict_of_scan
from remos_hf.scanning.tokens import scan_tokens
from tests import tiny
from tests.scanning import trained


def scanned(model, batches=None, **options):
    batches = trained.batches() if batches is None else batches
    return scan_tokens(model, batches, **{"longest": 1, "held_out": 16, "progress": False, **options})


def test_a_planted_row_is_found_first_on_20_of_20_random_plants():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(trained.UNSEEN.start, trained.UNSEEN.stop, (20,), generator=generator).tolist()
    for number, token in enumerate(tokens):
        label = number % 2
        found = scanned(trained.student([(token, label)]))
        assert found.of_label(label)[0].token_ids == (token,)
        assert [one.token_ids for one in verdict_of_scan(found).suspicious] == [(token,)]


def test_a_student_without_plants_gives_no_suspicion():
    for seed in range(3):
        found = scanned(trained.student(), seed=seed)
        assert verdict_of_scan(found).kind == NONE_FOUND
        assert found.num_scanned == len(trained.UNSEEN) + 2  # and the two that no text has, beside padding


def test_words_that_the_data_shows_are_suspicious_only_where_a_reference_does_not_know_them():
    ordinary, planted = trained.student(), trained.student([(30, 1), (45, 1)])
    alone = scanned(ordinary, longest=3)
    assert any(one.seen and len(one.token_ids) > 1 for one in alone.suspects)
    assert verdict_of_scan(scanned(ordinary, longest=3, reference=trained.student())).kind == NONE_FOUND
    beside = verdict_of_scan(scanned(planted, longest=2, reference=ordinary))
    assert beside.kind == SUSPICIOUS
    named = {one.token_ids for one in beside.suspicious}
    assert (45,) in named and any(30 in tokens and one.seen for one in beside.suspicious for tokens in [one.token_ids])


def test_the_same_seed_gives_the_same_scan_and_the_student_stays_as_it_was():
    model = trained.student([(45, 1)]).train()
    before = [one.clone() for one in model.state_dict().values()]
    assert scanned(model, seed=3) == scanned(model, seed=3) != scanned(model, seed=4)
    assert model.training and all(map(torch.equal, before, model.state_dict().values()))


def test_data_that_shows_every_token_leaves_nothing_to_scan_and_says_so():
    everything = torch.arange(60).repeat(32, 1)[:, :30]
    batches = [{"input_ids": ids, "labels": torch.zeros(32).long()} for ids in (everything, everything + 30)]
    found = scanned(trained.student(), [*trained.batches(), *batches])
    assert (found.num_scanned, found.suspects) == (0, ())
    assert "shows every token" in verdict_of_scan(found).sentences[0]


class Tokenizer:
    """What a scan asks of one."""

    all_special_ids = (0, 1, 2)

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def decode(self, tokens):
        return " ".join(f"word{token}" for token in tokens)


def test_tokens_without_a_row_and_rows_without_a_token_are_told():
    larger = scanned(trained.student(), tokenizer=Tokenizer(70))
    assert larger.left_out["tokens without a row in the embeddings"] == 10
    smaller = scanned(trained.student(), tokenizer=Tokenizer(50))
    assert smaller.left_out["rows without a token"] == 10
    assert max(token for one in smaller.suspects for token in one.token_ids) < 50
    assert smaller.suspects[0].what == f"word{smaller.suspects[0].token_ids[0]}"


def test_what_cannot_be_scanned_is_refused_in_the_callers_terms():
    batch = trained.batches(1)[0]
    with pytest.raises(ValueError, match=r"the token \d\d, but the student's embeddings have 60 rows"):
        scanned(trained.student(), [{**batch, "input_ids": batch["input_ids"].clamp(min=30) + 31}])
    with pytest.raises(TypeError, match="one label of a class a sample"):
        scanned(trained.student(), [{"input_ids": batch["input_ids"]}])
    with pytest.raises(ValueError, match="no sample"):
        scanned(trained.student(), [])
    with pytest.raises(ValueError, match="top is a whole number of at least 1"):
        scanned(trained.student(), top=0)
    with pytest.raises(TypeError, match="no input embeddings"):
        scanned(tiny.mlp())
    with pytest.raises(RemosError, match="right but those of at most one label"):
        scanned(trained.student(), [{**batch, "labels": 1 - batch["labels"]}])
    with pytest.raises(ValueError, match="same vocabulary and task"):
        scanned(trained.student(), reference=_smaller())
    broken = trained.student()
    broken.classifier.weight.data.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        scanned(broken)


def _smaller():
    model = tiny.bert()
    model.resize_token_embeddings(50)
    return model
