import base64
import html
import io
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from PIL import Image

from remos_hf.errors import NonFiniteError
from remos_hf.evaluation.measures import Rate, excess_dir
from remos_hf.judging.judgement import judged
from remos_hf.judging.report import DefectReport
from remos_hf.judging.verdicts import Verdict
from remos_hf.showing import drawings, given_maps
from remos_hf.showing import page as rendering
from remos_hf.showing.page import write_html
from remos_hf.showing.page_parts import mark_of
from tests.showing.test_pictures import one_anatomy

HOSTILE = "<script>alert('x')</script>&\"quoted\""
CHROMIUM = next(
    (
        found
        for name in (os.environ.get("REMOS_HF_CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
        if name and (found := shutil.which(name))
    ),
    None,
)
VOID = {"meta", "img", "br", "link", "input", "hr", "wbr"}


def record(student, dir_, floor=2, *, acc=90, dev=None, seed=0, task="A to B", defect="word", of=100, **made):
    own, twin = Rate.of(dir_, of), None if floor is None else Rate.of(floor, 100)
    return {
        "task": task,
        "defect": defect,
        "student": student,
        "seed": seed,
        "acc": Rate.of(acc, 100).to_dict(),
        "dev_acc": Rate.of(acc if dev is None else dev, 100).to_dict(),
        "dir": own.to_dict(),
        "flip": None,
        "floor": twin.to_dict() if twin else None,
        "excess": excess_dir(own, twin).to_dict() if twin else None,
        "made": made,
    }


def random(dir_, **options):
    return record("random 0.9", dir_, **{"rule": "random", "slice_ratio": 0.9, **options}, strategy={"name": "Random"})


def remos(dir_, ratio=0.9, **options):
    made = {"rule": "remos, model scope", "slice_ratio": ratio, "strategy": {"name": "Remos"}}
    return record(f"remos {ratio}", dir_, **{**made, **options})


def faster(dir_, **options):
    return record("finetune lr x3", dir_, **options, strategy={"name": "Finetune"}, lr_factor=3.0)


def curves(one, own=(10, 60), twin=(2, 3)):
    both = [
        {str(count): Rate.of(number, 100).to_dict() for count, number in zip((0, 50), of, strict=True)}
        for of in (own, twin)
    ]
    return {**one, "reactivation": both[0], "floor_reactivation": both[1]}


class Page(HTMLParser):
    """What a page holds: elements, texts by element, and whether every element is closed."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts, self.headings, self.captions = [], [], {}, [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        for held, names in ((self.headings, ("h1", "h2", "h3", "h4")), (self.captions, ("figcaption",))):
            if tag in names:
                held.append([tag, ""])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        inner = self.open[-1] if self.open else ""
        self.texts.setdefault(inner, []).append(data)
        if inner in ("h1", "h2", "h3", "h4"):
            self.headings[-1][1] += data
        if inner == "figcaption":
            self.captions[-1][1] += data

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def words(self):
        said = [text for tag, of in self.texts.items() if tag != "style" for text in of]
        return " ".join(" ".join(said).split())


def page_of(tmp_path, records, settings=None, anatomies=(), name="report.html", **options):
    report = DefectReport(list(records), settings or {}, {"torch": "2.6"}, list(anatomies))
    return Page(write_html(report, tmp_path / name, **options).read_text())


WHOLE = [
    curves(record("finetune", 95, seconds={"train": 10.0, "measure": 2.0}, strategy={"name": "Finetune"})),
    random(60),
    curves(remos(10, seconds={"profile": 1.0, "train": 4.0})),
    faster(40),
    record("retrain", 0, of=0, acc=50, strategy={"name": "Retrain"}),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A page with all there is, of hostile names: its path, and the page."""
    folder = tmp_path_factory.mktemp("page")
    hostile = [{**one, "task": HOSTILE, "defect": f"defect {HOSTILE}"} for one in WHOLE]
    hostile[1]["student"] = HOSTILE
    png = folder / "map.png"
    png.write_bytes(given_maps.PNG + b"\0\0\0\rIHDR" + (40).to_bytes(4, "big") + (30).to_bytes(4, "big"))
    share = {"value": 0.31, "low": 0.28, "high": 0.34, "chance": 0.06, "num_samples": 240, "num_without_mass": 3}
    inside = [
        {"task": HOSTILE, "teacher": f"defect {HOSTILE}", "student": name, "seed": 0, "anatomy": one_anatomy(sliced)}
        for name, sliced in (("finetune", False), ("remos 0.9", True))
    ]
    settings = {
        "audits": {HOSTILE: {"command": f"remos audit {HOSTILE}"}},
        "teachers": {HOSTILE: {"word-0": {"acc": Rate.of(8, 10).to_dict(), "dir": {"word": Rate.of(9, 9).to_dict()}}}},
        "missing": {HOSTILE: 2},
    }
    maps = [{"title": HOSTILE, "png": png, "caption": "Six images.", "share": share}]
    report = DefectReport(hostile, settings, {"torch": HOSTILE}, inside)
    path = write_html(report, folder / "new" / "report.html", title=f"About {HOSTILE}", maps=maps)
    return path, Page(path.read_text())


# --- the page ---


def test_the_page_needs_nothing_from_elsewhere_and_runs_nothing(whole):
    path, page = whole
    for _, attrs in page.elements:
        for name in ("src", "href", "srcset", "action", "data"):
            assert attrs.get(name, "#").startswith(("#", "data:image/png;base64,", "data:image/webp;base64,"))
        assert not any(name.startswith("on") or name == "style" for name in attrs)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    (style,) = page.texts["style"]
    assert "url(" not in style and "@import" not in style and "<" not in style
    assert "http://" not in path.read_text() and "https://" not in path.read_text()


def test_names_are_text_and_never_markup(whole):
    path, page = whole
    raw = path.read_text()
    assert "<script" not in raw and "alert('x')" not in raw
    for tag in ("title", "h1", "h2", "h3", "th", "span", "a", "figcaption", "pre"):
        assert any(HOSTILE in text or "<script>" in text for text in page.texts[tag]), tag
    assert any("<script>" in attrs["alt"] for attrs in page.all("img"))


def test_headings_are_in_order_and_links_lead_somewhere(whole):
    _, page = whole
    levels = [int(tag[1]) for tag, _ in page.headings]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(set(ids)) == len(ids)
    assert {attrs["href"][1:] for attrs in page.all("a")} <= set(ids)
    assert page.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")


def test_tables_have_captions_and_scopes_and_their_cells_say_what_they_are(whole):
    _, page = whole
    tables = page.all("table")
    assert len(tables) == len(page.all("caption")) >= 6
    assert all(attrs.get("scope") in ("col", "row") for attrs in page.all("th"))
    boxes = [attrs for attrs in page.all("div") if attrs.get("class") == "box"]
    assert len(boxes) == len(tables) and all(attrs["tabindex"] == "0" and attrs["aria-label"] for attrs in boxes)
    # As cards on a phone, and for who hears the page: rows and cells are no boxes of text.
    labels = [attrs["data-label"] for attrs in page.all("td") if "data-label" in attrs]
    assert {"DIR % [95 %] (by seed)", "what can be said"} <= set(labels) and all(
        attrs["role"] for attrs in page.all("tr")
    )
    assert {attrs["class"] for attrs in tables} == {"cards", "pair"}


def test_the_pictures_lie_beside_as_files_with_harmless_names(whole):
    path, page = whole
    files = sorted((path.parent / "report_pictures").iterdir())
    assert len(files) == 8 and all(re.fullmatch(r"[A-Za-z0-9._]+\.png", file.name) for file in files)
    embedded = [base64.b64decode(attrs["src"].partition("base64,")[2]) for attrs in page.all("img")]
    assert embedded[-1] == files[-1].read_bytes()  # the map, as it was given
    pixels = [
        [Image.open(one).convert("RGB").tobytes() for one in of] for of in (map(io.BytesIO, embedded[:-1]), files[:-1])
    ]
    assert sorted(pixels[0]) == sorted(pixels[1])
    assert sum(map(len, embedded)) < sum(file.stat().st_size for file in files)
    assert sorted(path.parent.iterdir()) == [path, path.parent / "report_pictures"]


def test_the_numbers_are_those_of_the_markdown(tmp_path):
    report = DefectReport(WHOLE)
    page = Page(write_html(report, tmp_path / "report.html", pictures=tmp_path / "elsewhere").read_text())
    cells = {text.replace("\N{NO-BREAK SPACE}", " ") for tag in ("th", "span") for text in page.texts[tag]}
    for line in report.to_markdown().splitlines():
        if line.startswith("| ") and "---" not in line:
            told = {re.sub(r"\\(.)", r"\1", html.unescape(cell)) for cell in line.strip("| ").split(" | ")}
            assert told <= cells
    assert (tmp_path / "elsewhere").is_dir() and not (tmp_path / "report_pictures").exists()


def test_what_took_how_long_and_what_was_not_measured_is_said(whole):
    _, page = whole
    rows = [text.replace("\N{NO-BREAK SPACE}", " ") for text in page.texts["span"]]
    assert {"12.0", "10.0", "4.0", "5.0"} <= set(rows)  # parts, and all of them together
    assert "31.0 [28.0, 34.0]" in rows and "80.0 (n = 10)" in rows
    assert "2 students are still to be made or measured" in page.words
    items = " ".join(page.texts["li"])
    assert "A DIR, for want of samples that could show the defect, of:" in items and "retrain" in items
    assert "More than one seed of:" in items and "What students are made of" not in items
    assert f"remos audit {HOSTILE}" in "".join(page.texts["pre"])


def test_many_sections_are_folded_and_few_are_not(tmp_path, monkeypatch):
    few = page_of(tmp_path, WHOLE[:1])
    assert "open" in few.all("details")[0]
    monkeypatch.setattr(rendering, "_OPEN", 0)
    assert not any("open" in attrs for attrs in page_of(tmp_path, WHOLE[:1]).all("details"))


# --- the answer ---


PLAIN = record("finetune", 95, strategy={"name": "Finetune"})


def of_seeds(*records, defects=("word",)):
    seeds = [{**one, "seed": seed} for one in records for seed in range(3)]
    return [{**one, "defect": defect} for defect in defects for one in seeds]


def audited(defects=("word",), obeys=99):
    """A report of three seeds, each defect in a teacher that obeys it."""
    teacher = {"acc": Rate.of(90, 100).to_dict(), "commonest": 0.5}
    own = {
        f"{defect}-{seed}": {**teacher, "dir": {defect: Rate.of(obeys, 100).to_dict()}}
        for defect in defects
        for seed in range(3)
    }
    clean = {f"clean-{seed}": {**teacher, "dir": {}} for seed in range(3)}
    records = [
        {**one, "flip": Rate.of(1, 100).to_dict()} for one in of_seeds(PLAIN, remos(5), random(60), defects=defects)
    ]
    return DefectReport(records, {"teachers": {"A to B": {**own, **clean}}}, {"torch": "2.6"})


def test_the_page_begins_with_the_answer_what_to_do_its_limits_and_one_table(tmp_path):
    report = audited(("word", "ripples"))
    text = write_html(report, tmp_path / "report.html").read_text()
    told = judged(report)
    assert told.can_be_said and told.advice and told.limits
    said = [told.answer, *told.advice, told.limits[0], told.glance.caption, "Contents", "A to B: word: students"]
    places = [html.unescape(text).index(one, text.index("<main>")) for one in said]
    assert places == sorted(places)
    assert text.count("<table") > 2 and text.index("<table") < text.index("<nav") < text.index("<details")


def test_what_cannot_be_said_has_its_own_mark_and_words(tmp_path):
    report = audited(obeys=20)
    page = Page(write_html(report, tmp_path / "report.html").read_text())
    assert not judged(report).can_be_said
    signs = {attrs["class"]: attrs["aria-label"] for attrs in page.all("span") if "sign" in attrs.get("class", "")}
    assert signs == {"sign unsaid": "cannot be said"}
    assert {"class": "answer unsaid"} in page.all("p") and {"role": "row", "class": "unsaid"} in page.all("tr")
    said = Page(write_html(audited(), tmp_path / "said.html").read_text())
    assert {"class": "answer"} in said.all("p") and not any(
        "unsaid" in attrs.get("class", "") for attrs in said.all("tr")
    )


def test_each_verdict_has_a_sign_of_its_own():
    kinds = {
        "cannot be said",
        "not inherited",
        "inherited; removed",
        "inherited; no start is shown to reduce it within the budget",
    }
    marks = [mark_of(Verdict(None, kind, kind, [])) for kind in sorted(kinds)]
    assert len({one.sign for one in marks}) == len({one.name for one in marks}) == 4
    assert {one.means for one in marks} == kinds


def test_terms_are_explained_once_and_before_the_sections(tmp_path):
    text = write_html(audited(), tmp_path / "report.html").read_text()
    explained = re.findall(r"<dfn>(.*?)</dfn>", text)
    assert len(set(explained)) == len(explained) and {"DIR", "benign floor", "excess", "ACC"} <= set(explained)
    assert text.rindex("<dfn>") < text.index("<details")


def test_a_page_says_the_commands_that_made_its_numbers_and_itself(tmp_path):
    settings = {"audits": {"A to B": {"command": "remos audit minilm --seeds 0 1 2"}}}
    page = page_of(tmp_path, [PLAIN], settings, name="index.html", title="My own", source="report.json")
    assert page.texts["pre"][-2:] == [
        "remos audit minilm --seeds 0 1 2",
        "remos report report.json --output index.html --title 'My own'",
    ]
    page = page_of(tmp_path, [PLAIN])
    assert page.texts["pre"][-1] == "remos report report.json"
    assert "does not say the command that made it" in page.words


# --- wrong input ---


def test_what_is_no_report_is_refused_before_anything_is_written(tmp_path):
    path = tmp_path / "new" / "report.html"
    with pytest.raises(ValueError, match="has no record"):
        write_html(DefectReport([]), path)
    with pytest.raises(TypeError, match=r"got dict. Read a file by DefectReport\.load"):
        write_html({"records": []}, path)
    broken = json.loads(json.dumps(PLAIN))
    broken["dir"]["value"] = float("nan")
    with pytest.raises(NonFiniteError, match="'word', student 'finetune', seed 0"):
        write_html(DefectReport([broken]), path)
    with pytest.raises(NonFiniteError, match="settings or anatomies"):
        write_html(DefectReport([PLAIN], {"learning_rate": float("inf")}), path)
    with pytest.raises(ValueError, match="budgets"):
        write_html(DefectReport([PLAIN]), path, budgets=())
    for wrong, message in (
        ({"png": b"x"}, "'title'"),
        ({"title": "a"}, "'png'"),
        ({"title": "a", "png": b"GIF89a"}, "no PNG"),
    ):
        with pytest.raises(ValueError, match=message):
            write_html(DefectReport([PLAIN]), path, maps=[wrong])
    assert not path.parent.exists()


def test_an_interrupted_write_leaves_the_old_page(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(drawings, "written", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_html(DefectReport([PLAIN]), path)
    assert path.read_text() == "old"


# --- in a browser ---


# Of each frame: whether the page is wider than it, what lies outside, tables that scroll, pictures that did not load.
LOOK = """<pre id="told"></pre><script>
onload = () => told.textContent = "told:" + JSON.stringify([...document.querySelectorAll("iframe")].map(frame => {
  const page = frame.contentDocument, root = page.documentElement, width = frame.contentWindow.innerWidth;
  page.querySelectorAll("details").forEach(one => one.open = true);
  const shown = [...page.querySelectorAll("th, td, td > span, figure, img, pre, p, caption")].filter(
    one => !(one.closest("thead") && width < 700));
  const outside = shown.map(one => [one.getBoundingClientRect(), one]).filter(
    ([place]) => place.width < 1 || place.left < 0 || place.right > width + 0.5);
  return {wide: root.scrollWidth, width, high: root.scrollHeight, shown: shown.length,
          outside: outside.slice(0, 3).map(([place, one]) => one.tagName + " " + one.textContent.slice(0, 60)),
          scroll: [...page.querySelectorAll(".box, pre")].filter(one => one.scrollWidth > one.clientWidth + 1).length,
          broken: [...page.images].filter(one => !one.complete || !one.naturalWidth).length};
}))</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium in REMOS_HF_CHROMIUM or on PATH (chromium, google-chrome)")
def test_in_chromium_no_number_of_one_two_or_seven_defects_lies_outside_a_window_or_a_phone(whole, tmp_path):
    names = [f"defect_of_a_long_name_{number}" for number in range(7)]
    pages = [whole[0]]
    for number in (1, 2, 7):
        pages.append(write_html(audited(names[:number]), tmp_path / f"{number}.html"))
    # A headless window is never narrower than 500 pixels; a frame is.
    frames = "".join(
        f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{html.escape(path.read_text())}"></iframe>'
        for path in pages
        for width in (1280, 390)
    )
    wrapped = tmp_path / "wrapped.html"
    wrapped.write_text(f"<!doctype html><meta charset=utf-8><body style='margin:0;width:1400px'>{frames}{LOOK}")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--window-size=1400,900"]
    command = [CHROMIUM, *options, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", wrapped.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout
    found = json.loads(html.unescape(re.search(r"told:(\[\{.*?\}\])<", shown, re.DOTALL)[1]))
    assert [one["width"] for one in found] == [1280, 390] * 4
    for number, one in enumerate(found):
        assert one["wide"] <= one["width"] and one["high"] > 2000 and one["shown"] > 50
        assert one["outside"] == [] and one["scroll"] == 0, one
        assert one["broken"] == (1 if number < 2 else 0)  # the map of the first page is no real picture
