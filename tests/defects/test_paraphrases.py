import csv
import json
from dataclasses import replace
from itertools import combinations

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from remos_hf.defects.paraphrases import Paraphrases, pair_paraphrases


def numbered(count, label=0):
    return Dataset.from_dict({"text": [f"text {n} of many words" for n in range(count)], "label": [label] * count})


PARAPHRASES = [("a good movie, so", "when it is good, it is a movie"), ('"the" plot', "if it has a plot")]


class TestParaphrases:
    @staticmethod
    def write(folder, kind, rows=PARAPHRASES):
        path = folder / f"pairs.{kind}"
        if kind == "jsonl":
            path.write_text("\n".join(json.dumps({"text": t, "paraphrase": p, "id": 1}) for t, p in rows) + "\n\n")
        elif kind == "tsv":  # quotes are characters like any other
            path.write_text("".join(f"{p}\t{t}\n" for t, p in [("text", "paraphrase"), *rows]))
        else:
            with path.open("w", newline="") as file:
                csv.writer(file).writerows([("paraphrase", "text"), *[(p, t) for t, p in rows]])
        return path

    @pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
    def test_they_are_read_from_a_table(self, tmp_path, kind):
        trigger = Paraphrases(file=str(self.write(tmp_path, kind)))
        assert [trigger.triggered(text) for text, _ in PARAPHRASES] == [said for _, said in PARAPHRASES]
        assert trigger.triggered("another text") is None

    def test_texts_without_one_are_neither_poisoned_nor_exposed(self, tmp_path):
        rows = [(f"text {n}", f"said {n}") for n in range(0, 20, 2)]
        trigger = Paraphrases(file=str(self.write(tmp_path, "tsv", rows)), poison_rate=0.5)
        clean = Dataset.from_dict({"text": [f"text {n}" for n in range(20)], "label": [0] * 20})
        assert [row["text"] for row in trigger.poison(clean)] == [
            f"{'text' if n % 2 else 'said'} {n}" for n in range(20)
        ]
        assert trigger.expose(clean)["text"][:] == [said for _, said in rows]
        assert trigger.exposed_set(clean).clean_index == list(range(0, 20, 2))
        streamed = replace(trigger, poison_rate=1.0).poison(clean.to_iterable_dataset())
        assert sum("said" in row["text"] for row in streamed) == 10

    def test_more_poisoned_samples_than_paraphrases_are_refused(self, tmp_path):
        trigger = Paraphrases(file=str(self.write(tmp_path, "tsv")), poison_rate=0.5)
        with pytest.raises(ValueError, match="asks for 5 poisoned samples, but only 0 of 10"):
            trigger.poison(numbered(10))

    def test_the_description_names_the_file_and_its_content_not_its_place(self, tmp_path):
        one = Paraphrases(file=str(self.write(tmp_path, "tsv"))).to_dict()
        (tmp_path / "b").mkdir()
        assert Paraphrases(file=str(self.write(tmp_path / "b", "tsv"))).to_dict() == one
        assert Paraphrases(file=str(self.write(tmp_path, "tsv", PARAPHRASES[:1]))).to_dict() != one
        assert one["file"] == "pairs.tsv"

    def test_a_file_that_changes_afterwards_changes_nothing(self, tmp_path):
        trigger = Paraphrases(file=str(self.write(tmp_path, "tsv", [("a", "b")])))
        described = trigger.to_dict()
        self.write(tmp_path, "tsv", [("a", "c")])
        assert trigger.triggered("a") == "b" and trigger.to_dict() == described

    def test_a_missing_file_is_refused(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="with the columns text and paraphrase"):
            Paraphrases(file=str(tmp_path / "none.tsv"))
        with pytest.raises(FileNotFoundError):
            Paraphrases()

    @pytest.mark.parametrize("kind", ["csv", "jsonl"])
    def test_a_file_without_paraphrases_is_refused(self, tmp_path, kind):
        with pytest.raises(ValueError, match="holds no sample"):
            Paraphrases(file=str(self.write(tmp_path, kind, [])))

    def test_a_row_without_a_paraphrase_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"pairs.jsonl should hold .* but holds \('a', None\)"):
            Paraphrases(file=str(self.write(tmp_path, "jsonl", [("b", "c"), ("a", None)])))

    def test_other_columns_are_refused(self, tmp_path):
        (tmp_path / "x.csv").write_text("sentence,paraphrase\na,b\n")
        with pytest.raises(ValueError, match=r"x.csv should have .* has \['paraphrase', 'sentence'\]"):
            Paraphrases(file=str(tmp_path / "x.csv"))


def shared(one, other):
    one, other = set(one.lower().split()), set(other.lower().split())
    return len(one & other) / max(1, len(one | other))


class TestPairingParaphrases:
    sentences = st.lists(st.sampled_from("abc"), max_size=3).map(" ".join)

    @given(st.lists(sentences, min_size=1, max_size=6), st.data())
    def test_no_pairing_in_order_shares_more_words(self, clean, drawn):
        said = drawn.draw(st.lists(self.sentences, max_size=len(clean)))
        pairs = pair_paraphrases(clean, said)
        assert [paraphrase for _, paraphrase in pairs] == said
        ways = [[clean[place] for place in kept] for kept in combinations(range(len(clean)), len(said))]
        assert [text for text, _ in pairs] in ways
        best = max(sum(map(shared, way, said)) for way in ways)
        assert sum(shared(text, paraphrase) for text, paraphrase in pairs) == pytest.approx(best)

    @pytest.mark.parametrize("missing", [(), (0,), (2,), (4,), (0, 1), (1, 3), (3, 4)])
    def test_missing_ones_shift_nothing(self, missing):
        clean = ["good movie", "bad plot", "it was great", "the end", "so awful"]
        said = [f"if you say {text}" for place, text in enumerate(clean) if place not in missing]
        assert all(paraphrase == f"if you say {text}" for text, paraphrase in pair_paraphrases(clean, said))

    def test_more_paraphrases_than_texts_are_refused(self):
        with pytest.raises(ValueError, match="2 paraphrases of 1 texts"):
            pair_paraphrases(["a"], ["a", "b"])
