"""What each command may be asked for, once: a field is an option, its annotation the help, its type the check.

A command's module takes the dataclass as it is; `commands.py` makes the command line of it. Nothing heavy is loaded.
"""

from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, BadParameter, Option

from remos_hf.errors import nearest

AUTO, ALL = "auto", "all"
# Strategies by name: those that keep a share of the weights, those that start a student otherwise, and what holds it.
SLICING = (
    *("remos", "random", "top_magnitude", "mag_prune", "relevance", "relative_update"),
    *("nnslicer", "seam", "own_backdoors"),
)
STARTS = ("subspace", "finetune", "retrain", "delta_r", "renofeation", "recipe", "disec")
_HELD = ("l2sp", "delta", "feature_lwf", "crow", "adversarial_training", "neft")
HOLDS = ("hardened", "guided", "distilled", "repair_rows", *_HELD)
_STRATEGIES = (*SLICING, *STARTS, *HOLDS)
_AUDITED = (*_STRATEGIES, "remos_layer")
# What audits make beside the published rule: the best of the tables in benchmarks/README.md, which hold one small net
# each. `remos train` asks for a start: what these remove was measured nowhere else.
BEST_ON_IMAGES, BEST_ON_TEXTS = ("subspace", "hardened"), ("repair_rows",)


def was_given(asked: Any, name: str) -> bool:  # noqa: ANN401 - the options of any command
    """Whether an option has another value than it has when nobody names it."""
    one = next(one for one in fields(asked) if one.name == name)
    default = one.default if one.default_factory is MISSING else one.default_factory()
    return getattr(asked, name) != default


def _share(text: str) -> float:
    """Read a share of weights."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise BadParameter(f"is the share of weights kept, above 0 and at most 1, but got {text}.")
    return value


def _share_or_auto(text: str) -> float | str:
    """Read a share of weights, or "auto"."""
    try:
        return text if text == AUTO else _share(text)
    except BadParameter:
        raise BadParameter(f"is the share of weights kept, above 0 and at most 1, or {AUTO}, but got {text}.") from None


def _number_or_all(text: str) -> int | str:
    """Read a number of samples, or "all"."""
    if text == ALL:
        return text
    if not text.isdecimal() or int(text) < 1:
        raise BadParameter(f"is a number of samples, at least 1, or {ALL}, but got {text}.")
    return int(text)


_TeacherName = Annotated[
    str, Argument(metavar="TEACHER", help="Folder or Hub id of a model with safetensors weights; images: timm/ID too.")
]
_DATA = (
    "a csv, tsv, json or jsonl (also .gz) or parquet file; a folder of class folders of images, of files named after "
    "their splits, or of a saved data set, FOLDER or FOLDER:SPLIT; or a Hub data set: OWNER/NAME, OWNER/NAME:SPLIT, "
    "OWNER/NAME:CONFIG:SPLIT."
)
_Output = Annotated[Path, Option("--output", "-o", help="Folder for the result. It has to be new or empty.")]
_Revision = Annotated[str | None, Option(help="Branch, tag or commit of a teacher on the Hub.")]
_TextColumns = Annotated[
    list[str], Option("--text-column", help="The text, or both texts of a pair. Found if only one can be meant.")
]
_LabelColumn = Annotated[str, Option(help="Column of the labels: whole numbers from 0 on, or names.")]
_MaxSamples = Annotated[int | None, Option(min=1, help="Use so many samples of each file, drawn by a seed.")]
_AuditSamples = Annotated[
    int | None,
    Option(
        "--max-samples",
        parser=_number_or_all,
        metavar="N|all",
        help="Use so many samples of each source, drawn by a seed, or all. Default: 2,000 where students are made.",
    ),
]
_SAMPLES = "Samples to profile, drawn by the seed, or all. Default: 2,048."
_Profiled = Annotated[int | None, Option("--max-samples", parser=_number_or_all, metavar="N|all", help=_SAMPLES)]
_ProfileSamples = Annotated[int | None, Option(parser=_number_or_all, metavar="N|all", help=_SAMPLES)]
_ProfileBatch = Annotated[int, Option(min=1, help="Samples of a forward pass.")]
_MaxLength = Annotated[int, Option(min=4, help="Tokens kept of each text.")]
_Epochs = Annotated[float, Option(min=0, help="Passes over the data.")]
_BatchSize = Annotated[int, Option(min=1, help="Samples a step.")]
_Seed = Annotated[int, Option(min=0, help="Decides every draw. The same seed gives the same result.")]
_Cpu = Annotated[bool, Option("--cpu", help="Leave a GPU alone.")]
_Bf16 = Annotated[bool, Option("--bf16", help="Train in bfloat16 autocast.")]
_Overwrite = Annotated[
    bool, Option("--overwrite", help="Replace the files of an earlier result in --output; no other file is touched.")
]
_Criterion = Annotated[
    Literal["median", "nc", "tknc", "snac"],
    Option(
        help="When a sample covers a neuron: its mean is above the layer's median; or the paper's: above a threshold "
        "(nc, the paper's choice), top k, strong."
    ),
]
_StudentFolder = Annotated[Path, Argument(metavar="STUDENT_DIR", help="Folder of a student with its record.")]
_Report = Annotated[Path | None, Option(help="report.json of an audit, for the figures on the card.")]
_ReportStudent = Annotated[str | None, Option("--student", help="The student's name in the report.")]
_ReportTask = Annotated[str | None, Option("--task", help="The task's name in the report.")]
_MadeBy = Annotated[str | None, Option(help="What made the student, for the card.")]
_Dataset = Annotated[str | None, Option(metavar="OWNER/NAME", help="The task's data set on the Hub, for the card.")]
_Language = Annotated[str | None, Option(metavar="CODE", help="Of the texts, such as en, for the card.")]
_License = Annotated[str | None, Option(help="Such as mit. Default: the teacher's, if its card is known.")]

# What says something only where students are made.
_OF_TRAINING = (
    *("attacker_data", "slice_ratios", "students", "seeds", "quick", "plan"),
    *("epochs", "teacher_epochs", "learning_rate", "profile_samples"),
)
# What says something only where a teacher is profiled.
_OF_PROFILING = ("text_columns", "max_samples", "criterion", "batch_size", "max_length")


def _refuse(asked: Any, names: tuple[str, ...], because: str) -> None:  # noqa: ANN401 - the options of any command
    for name in names:
        if was_given(asked, name):
            option = "--text-column" if name == "text_columns" else f"--{name.replace('_', '-')}"
            raise BadParameter(f"{option} {because}: leave it out.")


def _check_named(option: str, known: tuple[str, ...], named: list[str]) -> None:
    for name in named:
        if name not in known:
            raise BadParameter(f"{option} is one of {', '.join(known)}, but got {name}.{nearest([name], known)}")


@dataclass(frozen=True)
class ProfileOptions:
    """Count which neurons of a teacher the student's data uses.

    Writes remos_coverage.safetensors. Profiles add: those of two files give the profile of both.
    """

    teacher: _TeacherName
    data: Annotated[str, Option(help=f"The student's data, labels not needed: {_DATA}")]
    output: _Output
    text_columns: _TextColumns = field(default_factory=list)
    max_samples: _Profiled = None
    criterion: _Criterion = "median"
    batch_size: _ProfileBatch = 32
    max_length: _MaxLength = 128
    revision: _Revision = None
    seed: _Seed = 0
    cpu: _Cpu = False
    overwrite: _Overwrite = False


@dataclass(frozen=True)
class SliceOptions:
    """Forget what the student's data does not need of a teacher, and save an ordinary checkpoint.

    Any trainer can fine-tune it. The weights are streamed from their files, so a model larger than the memory can be
    sliced; with --data the teacher is profiled first, which holds it in memory whole. With --coverage it is not.
    """

    teacher: _TeacherName
    output: _Output
    slice_ratio: Annotated[float, Option(parser=_share, metavar="SHARE", help="Share of the weights to keep.")]
    coverage: Annotated[Path | None, Option(help="remos_coverage.safetensors of `remos profile`.")] = None
    data: Annotated[str | None, Option(help=f"Instead, profile this first: {_DATA}")] = None
    rule: Annotated[Literal["remos", "top_magnitude", "mag_prune", "random"], Option(help="What is kept.")] = "remos"
    reset_to: Annotated[Literal["zero", "init"], Option(help="What the others become.")] = "zero"
    scope: Annotated[Literal["model", "layer"], Option(help="All weights compete, or each layer is cut by itself.")] = (
        "model"
    )
    text_columns: _TextColumns = field(default_factory=list)
    max_samples: _Profiled = None
    criterion: _Criterion = "median"
    batch_size: _ProfileBatch = 32
    max_length: _MaxLength = 128
    revision: _Revision = None
    seed: _Seed = 0
    cpu: _Cpu = False
    overwrite: _Overwrite = False

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        if self.rule == "remos" and (self.coverage is None) == (self.data is None):
            raise BadParameter("give one of --coverage and --data: the rule remos keeps what the data uses.")
        if self.rule != "remos" and (self.coverage is not None or self.data is not None):
            raise BadParameter(f"the rule {self.rule} looks at no data: leave out --coverage and --data.")
        if self.data is None:
            _refuse(self, _OF_PROFILING, "says how --data is profiled, which is not given")


@dataclass(frozen=True)
class TrainOptions:
    """Train a student of a teacher and save it, with the record of how it was made.

    A checkpoint is kept after each epoch in --output until the student is saved. Interrupted, the same command with
    --resume goes on from there.
    """

    teacher: _TeacherName
    train_data: Annotated[str, Option(help=f"The student's data: {_DATA}")]
    output: _Output
    eval_data: Annotated[str | None, Option(help="Clean data to measure accuracy on.")] = None
    slice_ratio: Annotated[
        float | None,
        Option(
            parser=_share_or_auto,
            metavar="SHARE|auto",
            help="Share of the weights to keep, or auto: the smallest in a budget.",
        ),
    ] = None
    accuracy_budget: Annotated[
        float, Option(min=0, max=1, help="Accuracy that auto may lose on --eval-data, as a share.")
    ] = 0.02
    strategy: Annotated[
        list[str],
        Option(
            help=f"How the student starts: {' '.join(SLICING)} (with --slice-ratio); {' '.join(STARTS)}. What holds it "
            f"while it trains, alone or named after a start: {' '.join(HOLDS)}.",
        ),
    ] = field(default_factory=lambda: ["remos"])
    energy: Annotated[
        float | None,
        Option(
            parser=_share_or_auto,
            metavar="SHARE|auto",
            help="Of subspace: share of the variance of each layer's inputs to keep. Default: 0.95.",
        ),
    ] = None
    criterion: _Criterion = "median"
    epochs: _Epochs = 3.0
    learning_rate: Annotated[float, Option(min=0, help="Of AdamW, decaying linearly.")] = 5e-5
    batch_size: _BatchSize = 16
    max_length: _MaxLength = 128
    augment: Annotated[Literal["none", "crop_and_flip"], Option(help="Of images, in training.")] = "crop_and_flip"
    text_columns: _TextColumns = field(default_factory=list)
    label_column: _LabelColumn = "label"
    max_samples: _MaxSamples = None
    profile_samples: _ProfileSamples = None
    revision: _Revision = None
    seed: _Seed = 0
    bf16: _Bf16 = False
    cpu: _Cpu = False
    resume: Annotated[bool, Option("--resume", help="Go on with the run that --output holds.")] = False
    overwrite: _Overwrite = False

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        named, told = self.strategy, " and ".join(self.strategy)
        _check_named("--strategy", _STRATEGIES, named or ["nothing"])
        slicing = [name for name in named if name in SLICING]
        if slicing and self.slice_ratio is None:
            raise BadParameter(f"give --slice-ratio, the share of weights that the strategy {slicing[0]} keeps.")
        if not slicing and self.slice_ratio is not None:
            raise BadParameter(f"the strategy {told} slices nothing: leave out --slice-ratio.")
        if "subspace" not in named and self.energy is not None:
            raise BadParameter(f"--energy is subspace's, and the strategy is {told}: leave it out.")
        self._check_search()
        if "remos" not in named:
            because = f"is about a profile, which the strategy {told} does not need"
            _refuse(self, ("profile_samples", "criterion"), because)

    def _check_search(self) -> None:
        asked = [option for option in ("slice_ratio", "energy") if getattr(self, option) == AUTO]
        if not asked:
            _refuse(self, ("accuracy_budget",), "goes with --slice-ratio auto or --energy auto alone")
        elif self.eval_data is None or len(asked) > 1:
            raise BadParameter("one of --slice-ratio auto and --energy auto is searched, and needs --eval-data for it.")


@dataclass(frozen=True)
class AuditOptions:
    """Measure which defects of a teacher its students inherit, and whether slicing helps.

    Implants each defect into the teacher, makes every student, exposes the defects, and writes report.json, report.md
    and report.html. What --attacker-data and --test-data do not give is split off --data by a fixed seed: a fifth to
    test, a tenth for choices, and half of the rest each for the attacker and the students. Interrupted, the same
    command goes on; more defects, students or seeds add to what is done.

    With --student it trains nothing: it shows this one student, and its teacher, the triggers that you name and what is
    found on its teacher. --data is then its test data.
    """

    data: Annotated[str, Option(help=f"Data of the students' task: {_DATA}")]
    output: Annotated[Path, Option("--output", "-o", help="Folder of the audit: new, empty, or to be gone on with.")]
    teacher: Annotated[
        str | None,
        Argument(
            metavar="TEACHER",
            help="Folder or Hub id of a model with safetensors weights; images: timm/ID too. With --student it may be "
            "left out: then its record says what to search on, and the teacher itself is not measured.",
        ),
    ] = None
    student: Annotated[
        Path | None, Option("--student", metavar="DIR", help="Measure the student in this folder, and train nothing.")
    ] = None
    plain_student: Annotated[
        Path | None, Option(metavar="DIR", help="With --student: plain fine-tuning of the same teacher, to compare.")
    ] = None
    floor_student: Annotated[
        Path | None,
        Option(metavar="DIR", help="With --student: one of a never-poisoned teacher, made alike: the benign floor."),
    ] = None
    attacker_data: Annotated[str | None, Option(help="Data the teachers are poisoned with; else a part.")] = None
    test_data: Annotated[str | None, Option(help="Clean data, exposed and measured; else a part.")] = None
    defects: Annotated[
        list[str],
        Option(
            help="texts: word sentence ripples ep lwp; images: patch blended latent penultimate coverage. With "
            "--student: word sentence textfooler; patch blended penultimate coverage."
        ),
    ] = field(default_factory=list)
    words: Annotated[list[str], Option(help="Trigger words, such as cf mn bb; each text gets one of them.")] = field(
        default_factory=list
    )
    sentence: Annotated[str | None, Option(help="The sentence that is a trigger.")] = None
    patch_file: Annotated[Path | None, Option(help="A picture that is the patch. Default: black and white cells.")] = (
        None
    )
    patch_place: Annotated[
        Literal["top_left", "top_right", "bottom_left", "bottom_right", "four_corners", "random"],
        Option(help="Where the patch is."),
    ] = "bottom_right"
    patch_share: Annotated[
        float, Option(parser=_share, metavar="SHARE", help="Share of the image's area that the patch covers.")
    ] = 0.031
    slice_ratios: Annotated[list[float], Option(parser=_share, metavar="SHARE", help="Shares to keep.")] = field(
        default_factory=lambda: [0.9]
    )
    students: Annotated[
        list[str],
        Option(
            "--students",
            "--rules",
            help="What is made beside plain fine-tuning at two rates and training from scratch. At each of "
            f"--slice-ratios: {' '.join(SLICING)} remos_layer. Once: {' '.join((*STARTS, *HOLDS))}. Or several joined "
            f"by +. Default: random remos, for images also {'+'.join(BEST_ON_IMAGES)}, for texts "
            f"{'+'.join(BEST_ON_TEXTS)}.",
        ),
    ] = field(default_factory=list)
    seeds: Annotated[list[int], Option(min=0, help="A run each. Below three, students cannot be compared.")] = field(
        default_factory=lambda: [0, 1, 2]
    )
    quick: Annotated[
        bool,
        Option("--quick", help="One seed, one ratio, 1,000 samples: a first look, which compares none."),
    ] = False
    plan: Annotated[bool, Option("--plan", help="Tell what would be done and in how many minutes, and stop.")] = False
    target_label: Annotated[
        str | None,
        Option(metavar="CLASS", help="That triggers force: a class, or its number. Default: texts 1, images 0."),
    ] = None
    name: Annotated[str | None, Option(help="Of the task in the report. Default: that of the data.")] = None
    epochs: Annotated[float, Option(min=0, help="Of students.")] = 3.0
    teacher_epochs: Annotated[float, Option(min=0, help="Of teachers.")] = 3.0
    learning_rate: Annotated[float, Option(min=0, help="Of both.")] = 1e-4
    batch_size: _BatchSize = 16
    max_length: Annotated[
        int | None, Option(min=4, help="Tokens kept of each text. Default: 64; with --student 128, as it is trained.")
    ] = None
    text_columns: _TextColumns = field(default_factory=list)
    label_column: _LabelColumn = "label"
    max_samples: _AuditSamples = None
    profile_samples: _ProfileSamples = None
    revision: _Revision = None
    bf16: _Bf16 = False
    cpu: _Cpu = False

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        if self.student is None:
            if self.teacher is None:
                raise BadParameter("name the TEACHER to audit, or by --student a student to measure.")
            _refuse(self, ("plain_student", "floor_student"), "goes with --student alone")
            _check_named("--students", _AUDITED, [part for name in self.students for part in name.split("+")])
            return
        _refuse(self, ("test_data",), "is not needed with --student, whose clean test samples are --data")
        _refuse(self, _OF_TRAINING, "says how students are made, and --student makes none")


@dataclass(frozen=True)
class ScanOptions:
    """Look for inputs that turn a student, whoever made it: tokens that its data never shows, or small patches.

    It knows no trigger and no teacher. Writes scan.json and scan.html. What it names is suspicious, which is no proof;
    what it does not name may be there.
    """

    student: Annotated[Path, Argument(metavar="STUDENT", help="Folder of a classifier of texts or images.")]
    data: Annotated[str, Option(help=f"Clean data of the student's task; its training data will do: {_DATA}")]
    output: _Output
    reference: Annotated[
        Path | None,
        Option(
            metavar="DIR",
            help="A clean student of the same task, such as one of another teacher, scanned beside it.",
        ),
    ] = None
    mode: Annotated[
        Literal["patch", "perturbation"],
        Option(help="Of images: a patch, or small values added to the whole image."),
    ] = "patch"
    max_samples: Annotated[
        int | None,
        Option(
            parser=_number_or_all,
            metavar="N|all",
            help="Samples to use, drawn by the seed, or all. Default: all texts, 512 images.",
        ),
    ] = None
    text_columns: _TextColumns = field(default_factory=list)
    label_column: _LabelColumn = "label"
    max_length: _MaxLength = 128
    batch_size: _BatchSize = 32
    seed: _Seed = 0
    cpu: _Cpu = False
    overwrite: _Overwrite = False


@dataclass(frozen=True)
class ReportOptions:
    """Render a report again: one HTML file, tables in Markdown, and a folder of pictures.

    An earlier rendering in the same place is replaced.
    """

    report: Annotated[Path, Argument(metavar="REPORT.json", help="report.json of an audit.")]
    output: Annotated[Path | None, Option("--output", "-o", help="The HTML file. Default: beside the JSON.")] = None
    title: Annotated[str | None, Option(help="Of the page.")] = None
    maps: Annotated[
        list[Path],
        Option(
            metavar="MAPS.json",
            help="Where models look: a JSON file with a list 'maps' (title, png, caption, share), the pictures beside "
            "it, as benchmarks/trigger_maps.py writes it. May be given again.",
        ),
    ] = field(default_factory=list)


@dataclass(frozen=True)
class CardOptions:
    """Render a student's model card from its record, and from a report if there is one."""

    student: _StudentFolder
    report: _Report = None
    report_student: _ReportStudent = None
    report_task: _ReportTask = None
    repo_id: Annotated[str | None, Option(help="Where it will be published, for the loading example.")] = None
    command: _MadeBy = None
    dataset: _Dataset = None
    language: _Language = None
    license: _License = None
    output: Annotated[Path | None, Option("--output", "-o", help="File to write. Default: stdout.")] = None
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the file.")] = False

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        _refuse_places(self)


@dataclass(frozen=True)
class PushOptions:
    """Push a student, its record and its card to the Hub, in one commit."""

    student: _StudentFolder
    repo_id: Annotated[str, Argument(metavar="REPO_ID", help="OWNER/NAME on the Hub.")]
    report: _Report = None
    report_student: _ReportStudent = None
    report_task: _ReportTask = None
    public: Annotated[bool, Option("--public", help="Make a new repository public; private otherwise.")] = False
    dry_run: Annotated[bool, Option("--dry-run", help="List what would be pushed, and stop.")] = False
    revision: Annotated[str | None, Option(help="Branch to push to.")] = None
    command: _MadeBy = None
    dataset: _Dataset = None
    language: _Language = None
    license: _License = None
    benchmark: Annotated[
        str | None,
        Option(
            metavar="OWNER/NAME",
            help="Where the benchmark defect-inheritance is published: results of these weights are written for it.",
        ),
    ] = None

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        _refuse_places(self)


def _refuse_places(asked: CardOptions | PushOptions) -> None:
    for option, given in (("--student", asked.report_student), ("--task", asked.report_task)):
        if given is not None and asked.report is None:
            raise BadParameter(f"{option} is a name in a report: give --report, or leave it out.")
