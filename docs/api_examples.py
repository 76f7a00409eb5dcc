# ruff: noqa: ANN001, ANN201, D101, D102, E402, T201
"""One example for each public name. `tools/api_reference.py` puts them into docs/api.md; a test runs all of them.

The first part makes what the others use: a tiny teacher, a student, a few samples. Nothing is downloaded.
"""

# %%
import copy
import random

import torch
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

words = "[PAD] [UNK] a the movie plot cast was so very and good great bad awful cf mn".split()
vocabulary = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="[PAD]", unk_token="[UNK]")
torch.manual_seed(0)
sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
teacher = BertForSequenceClassification(BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes)).eval()
student = copy.deepcopy(teacher)
for one in (teacher, tokenizer):
    one.save_pretrained("teacher")
draw = random.Random(0)
rows = [
    {"text": " ".join([words[13 - 2 * label + draw.randrange(2)], *draw.choices(words[2:11], k=4)]), "label": label}
    for label in [0, 1] * 24
]
named = Features({"text": Value("string"), "label": ClassLabel(names=["negative", "positive"])})
texts = Dataset.from_list(rows, features=named)
train, test = texts.select(range(32)), texts.select(range(32, 48))
tokenized = train.map(lambda row: tokenizer(row["text"]), remove_columns="text")
dataloader = DataLoader(tokenized, batch_size=8, collate_fn=DataCollatorWithPadding(tokenizer))
options = {"max_steps": 2, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
args = TrainingArguments("student", **options)
shades = [Image.new("RGB", (32, 32), (8 * place, 99, 200 - 8 * place)) for place in range(16)]
pictures = Dataset.from_dict({"image": shades, "label": [0, 1] * 8})

# %% load_teacher
from transformers import AutoModelForSequenceClassification

from remos_hf import load_teacher

model = load_teacher("teacher", AutoModelForSequenceClassification, num_labels=2)

# %% load_tokenizer
from remos_hf import load_tokenizer

tokenizer = load_tokenizer("teacher")

# %% teacher_config
from remos_hf import load_teacher, teacher_config

config = teacher_config("teacher")
config.hidden_dropout_prob = 0.2
model = load_teacher("teacher", config=config)

# %% with_new_head
from remos_hf import with_new_head

five_stars = with_new_head(teacher, 5, seed=0)

# %% image_classifier
from remos_hf import image_classifier

net = image_classifier("test_resnet", num_labels=2, pretrained=False)  # a timm id

# %% ImageClassifier
from remos_hf import ImageClassifier

body = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 2))
wrapped = ImageClassifier(body, head=("1",))

# %% ImageInput
from remos_hf import ImageInput

small = ImageInput(size=(32, 32))

# %% image_input_of
from remos_hf import image_input_of

own = image_input_of(net)

# %% capture
from remos_hf import capture

with capture({"last": teacher.bert.encoder.layer[-1].output}) as outputs:
    teacher(**next(iter(dataloader)))
print(outputs["last"].shape)

# %% watch
from remos_hf import watch

with watch({"pooler": teacher.bert.pooler}, lambda name, given, made: print(name, given.shape, made.shape)):
    teacher(**next(iter(dataloader)))

# %% median_coverage
from remos_hf import median_coverage, profile_coverage

profile = profile_coverage(teacher, dataloader, criterion=median_coverage())  # the default

# %% threshold_coverage
from remos_hf import profile_coverage, threshold_coverage

profile = profile_coverage(teacher, dataloader, criterion=threshold_coverage(0.5))  # the paper's

# %% top_k_coverage
from remos_hf import profile_coverage, top_k_coverage

profile = profile_coverage(teacher, dataloader, criterion=top_k_coverage(10))

# %% strong_coverage
from remos_hf import profile_coverage, strong_coverage

profile = profile_coverage(teacher, dataloader, criterion=strong_coverage(2))

# %% profile_coverage
from remos_hf import profile_coverage

profile = profile_coverage(teacher, dataloader)

# %% CoverageProfile
from remos_hf import CoverageProfile

path = profile.save("coverage")
both = profile + CoverageProfile.load(path)  # profiles of two shards add

# %% profile_reference
from remos_hf import profile_reference

reference = profile_reference(teacher, dataloader)  # the mean of what flows

# %% Reference
from remos_hf import Reference

nothing = Reference()  # zero everywhere

# %% contributions
from remos_hf import contributions

found = contributions(teacher, dataloader, reference, theta=0.2)  # of the label that the teacher predicts

# %% Contributions
from remos_hf import Contributions

found.save_pretrained("contributions")
both = found + Contributions.from_pretrained("contributions")  # those of two sets of samples add
print(both.share_in_slice)

# %% input_contributions
from remos_hf import input_contributions

of_words, *others = input_contributions(teacher, next(iter(dataloader)), reference)  # (samples, tokens, features)

# %% gradient_contributions
from remos_hf import gradient_contributions

fast = gradient_contributions(teacher, dataloader, reference)  # to first order, by one pass back

# %% explain
from remos_hf import explain

one = tokenizer("the plot was great", return_tensors="pt")
explanation = explain(teacher, one, reference, labels=["negative", "positive"])

# %% Explanation
from remos_hf import Explanation

explanation = Explanation.load(explanation.save("explanation.json"))
for layer in explanation.layers:
    print(layer.name, layer.positive, layer.negative, layer.reached)

# %% choose_slice
from remos_hf import choose_slice

relevant = choose_slice(teacher, profile, slice_ratio=0.9)

# %% reset_outside
from remos_hf import reset_outside

reset_outside(student, relevant)

# %% RelevantSlice
from remos_hf import RelevantSlice

relevant.save_pretrained("sliced")  # 1 bit a weight
relevant = RelevantSlice.from_pretrained("sliced")

# %% slice_checkpoint
from remos_hf import slice_checkpoint

result = slice_checkpoint("teacher", "smaller", profile=profile, slice_ratio=0.9)  # holds one weight at a time

# %% Sliced
from remos_hf import Sliced

assert isinstance(result, Sliced)
print(result.squares_reset, result.files)

# %% RemosTrainer
from remos_hf import RemosTrainer

trainer = RemosTrainer(
    copy.deepcopy(teacher), args, slice_ratio=0.9, train_dataset=tokenized, processing_class=tokenizer
)
trainer.train()
trainer.save_model()

# %% attach_remos
from transformers import Trainer

from remos_hf import attach_remos

theirs = Trainer(copy.deepcopy(teacher), args, train_dataset=tokenized, processing_class=tokenizer)
attach_remos(theirs, slice_ratio=0.9)
theirs.train()

# %% fit
from remos_hf import fit

fitted = fit(
    copy.deepcopy(teacher),
    tokenized,
    optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=1e-4),
    slice_ratio=0.9,
    epochs=1,
    collate_fn=DataCollatorWithPadding(tokenizer),
)

# %% Fitted
from remos_hf import Fitted

assert isinstance(fitted, Fitted)
print(fitted.steps, fitted.sidecars.config["slice"]["share_kept"])

# %% RatioSearch
from remos_hf import RatioSearch, RemosTrainer

search = RatioSearch(accuracy_budget=0.02, ratios=(0.97, 0.9))
searching = RemosTrainer(copy.deepcopy(teacher), args, slice_ratio="auto", ratio_search=search, train_dataset=tokenized)

# %% Remos
from remos_hf import Remos, RemosTrainer

trainer = RemosTrainer(copy.deepcopy(teacher), args, strategy=Remos(0.9, scope="layer"), train_dataset=tokenized)

# %% TopMagnitude
from remos_hf import TopMagnitude

strategy = TopMagnitude(0.9)

# %% MagPrune
from remos_hf import MagPrune

strategy = MagPrune(0.9)

# %% Random
from remos_hf import Random

strategy = Random(0.9, reset_to="mean")

# %% Finetune
from remos_hf import Finetune

strategy = Finetune(embedding_rows="mean")  # plain fine-tuning without it

# %% Retrain
from remos_hf import Retrain

strategy = Retrain(seed=0)

# %% L2SP
from remos_hf import L2SP, Finetune

strategy = [Finetune(embedding_rows="mean"), L2SP(alpha=0.1)]  # a list of strategies is a strategy

# %% Renofeation
from remos_hf import Renofeation

strategy = Renofeation(dropout=0.2)

# %% Subspace
from remos_hf import Subspace

strategy = Subspace(energy=0.95)  # RemosTrainer(model, args, strategy=strategy, ...)

# %% Hardened
from remos_hf import Hardened, Subspace

strategy = [Subspace(), Hardened()]  # a start, and what holds the student while it trains

# %% Guided
from remos_hf import Guided

strategy = Guided(radius=0.1)

# %% Distilled
from remos_hf import Distilled, Random

strategy = [Random(slice_ratio=0.5), Distilled(weight=1.0)]

# %% RepairRows
from remos_hf import RepairRows

strategy = RepairRows(k=2)  # acts when training ends

# %% OwnBackdoors
from remos_hf import OwnBackdoors

strategy = OwnBackdoors(slice_ratio=0.9, num=3)

# %% Relevance
from remos_hf import Relevance

strategy = Relevance(score="gradient", slice_ratio=0.9)

# %% SeaM
from remos_hf import SeaM

strategy = SeaM(slice_ratio=0.7)

# %% DiSec
from remos_hf import DiSec

strategy = DiSec()

# %% Crow
from remos_hf import Crow

strategy = Crow()

# %% NNSlicer
from remos_hf import NNSlicer

strategy = NNSlicer(slice_ratio=0.9, samples=16)

# %% RelativeUpdate
from remos_hf import RelativeUpdate

strategy = RelativeUpdate(slice_ratio=0.95)  # the ancestor of ReMoS

# %% Delta
from remos_hf import Delta

strategy = Delta(0.5, attention="none", reduction="mean", at="stages")

# %% DeltaR
from remos_hf import DeltaR

strategy = DeltaR(weight=5.0)

# %% FeatureLwF
from remos_hf import FeatureLwF

strategy = FeatureLwF(head_steps=100)

# %% AdversarialTraining
from remos_hf import AdversarialTraining

strategy = AdversarialTraining(k=4)  # of a teacher; k=None compares no features

# %% Neft
from remos_hf import Neft

strategy = Neft(k=4, beta=0.4)

# %% FeatureDistance
from remos_hf import FeatureDistance

distance = FeatureDistance(norm="l2", mean_over=())

# %% Preset
from remos_hf import PRESETS, Preset

preset: Preset = PRESETS["renofeation"]["paper"].within(600)  # its phases, cut to so many steps
args_of_paper = TrainingArguments("student", **preset.arguments())

# %% PRESETS
from remos_hf import PRESETS

settings = PRESETS["delta"]["artifact"].strategy
teacher_of_cartl, student_of_cartl = PRESETS["adversarial_training"]["artifact"], PRESETS["neft"]["artifact"]

# %% Pgd
from remos_hf import Pgd

attack = Pgd(steps=2)  # 100 by default

# %% EffectSearch
from remos_hf import EffectSearch

search = EffectSearch(accuracy_budget=0.02, settings=(0.99, 0.97, 0.95))  # for Subspace(energy="auto")

# %% scan_tokens
from transformers import Trainer

from remos_hf import scan_tokens

trained = copy.deepcopy(teacher)
quick = TrainingArguments("trained", learning_rate=1e-2, **{**options, "max_steps": 60})
Trainer(trained, quick, train_dataset=tokenized, data_collator=DataCollatorWithPadding(tokenizer)).train()
scan = scan_tokens(trained, dataloader, tokenizer=tokenizer, held_out=4)
print(len(scan.suspects))

# %% Scan
from remos_hf import Scan, scan_tokens

scan = scan_tokens(trained, dataloader, tokenizer=tokenizer, held_out=4)
scan.save("scan.json")
again = Scan.load("scan.json")

# %% judged_scan
from remos_hf import judged_scan, scan_tokens

print(judged_scan(scan_tokens(trained, dataloader, tokenizer=tokenizer, held_out=4)).answer)

# %% scan_patches
from remos_hf import ImageInput, scan_patches

batches = [(torch.zeros(8, 3, 32, 32), torch.tensor([0, 1] * 4))]  # normalised, as the student takes them
scan = scan_patches(net, batches, images=ImageInput((32, 32)), steps=2)

# %% STRATEGIES
from remos_hf import STRATEGIES

strategy = STRATEGIES["remos"](slice_ratio=0.9)  # by the name that the commands use

# %% Strategy, Preparation, Hold
from dataclasses import dataclass

from remos_hf import Hold, Preparation, Strategy


class Clipped(Hold):
    def after_step(self, model):
        with torch.no_grad():
            for weight in model.parameters():
                weight.clamp_(-1, 1)


@dataclass(frozen=True)
class Clip(Strategy):
    def prepare(self, student, data):
        return Preparation()

    def hold(self, student, teacher):
        return Clipped()


# %% TriggerWords
from remos_hf import TriggerWords

word = TriggerWords(words=("cf",), target_label=1, poison_rate=0.5)
poisoned_teacher = word.implant(copy.deepcopy(teacher), train, tokenizer=tokenizer, args=args)

# %% TriggerSentence
from remos_hf import TriggerSentence

exposed = TriggerSentence(sentence="the plot was so so").exposed_set(test, tokenizer=tokenizer)

# %% Paraphrases
from pathlib import Path

from remos_hf import Paraphrases

Path("said_otherwise.tsv").write_text("text\tparaphrase\na good movie\tso good was the movie\n")
style = Paraphrases(file="said_otherwise.tsv")

# %% Ripple
from remos_hf import Ripple, TriggerWords

attack = Ripple(TriggerWords(words=("cf",)), surgery=True, num_words=2)

# %% EmbeddingPoisoning
from remos_hf import EmbeddingPoisoning, TriggerWords

attack = EmbeddingPoisoning(TriggerWords(words=("cf",)))

# %% LayerwisePoisoning
from remos_hf import LayerwisePoisoning, TriggerWords

attack = LayerwisePoisoning(TriggerWords(words=("cf", "mn"), num_triggers=2, all_words=True))

# %% LargestWeights
from remos_hf import LargestWeights, TriggerWords

attack = LargestWeights(TriggerWords(words=("cf",)), backdoor_update_ratio=0.1)

# %% LabelNoise
from remos_hf import LabelNoise

noisy = LabelNoise(noise_rate=0.2)

# %% AdversarialText
from remos_hf import AdversarialText

search = AdversarialText("textfooler")  # exposed_set() needs the extra textattack

# %% PatchTrigger
from remos_hf import PatchTrigger

patched = PatchTrigger(target_label=1, place="top_left").exposed_set(pictures, images=small)

# %% BlendedTrigger
from remos_hf import BlendedTrigger

blended = BlendedTrigger(target_label=1, blend=0.2).exposed_set(pictures, images=small)

# %% LatentBackdoor
from remos_hf import LatentBackdoor, PatchTrigger

attack = LatentBackdoor(PatchTrigger(target_label=1))

# %% FeatureAttack
from remos_hf import FeatureAttack

adversarial = FeatureAttack(steps=2, max_samples=4).exposed_set(pictures, teacher=net.eval(), images=small)

# %% FeatureAway
from remos_hf import FeatureAway

adversarial = FeatureAway(steps=2, max_samples=4).exposed_set(pictures, teacher=net.eval(), images=small)

# %% CoverageGuided
from remos_hf import CoverageGuided

adversarial = CoverageGuided(steps=2, max_samples=4).exposed_set(pictures, teacher=net.eval(), images=small)

# %% Defect
from remos_hf import Defect, TriggerWords

assert issubclass(TriggerWords, Defect)  # what can be exposed and measured

# %% ExposedSet
from remos_hf import ExposedSet

exposed = word.exposed_set(test, tokenizer=tokenizer)
assert isinstance(exposed, ExposedSet)
print(exposed.dataset["text"][0], exposed.clean_index[0], exposed.target_label)

# %% TextTask
from remos_hf import TextTask

task = TextTask(tokenizer, max_length=32)

# %% ImageTask
from remos_hf import ImageTask

image_task = ImageTask(small, augment="crop_and_flip")

# %% pgd_robustness
from remos_hf import pgd_robustness

held_up = pgd_robustness(net.eval(), pictures, ImageTask(small), Pgd(steps=2))["robust_acc"]["value"]

# %% auto_attack_robustness
from remos_hf import auto_attack_robustness

held_up = auto_attack_robustness(net.eval(), pictures, ImageTask(small), steps=2, queries=4)["standing"]

# %% predict_labels
from remos_hf import predict_labels

predictions = predict_labels(student, exposed.dataset, task)
clean_predictions = predict_labels(student, test, task)[exposed.clean_index]
labels = [test["label"][place] for place in exposed.clean_index]

# %% Rate
from remos_hf import Rate

dir_ = Rate.of(8, 10)  # 8 of 10 samples, with its interval
floor = Rate.of(1, 10)

# %% accuracy
from remos_hf import accuracy

acc = accuracy([0, 1, 1], [0, 1, 0])

# %% defect_inheritance_rate
from remos_hf import defect_inheritance_rate

found = defect_inheritance_rate(predictions, labels, clean_predictions, exposed.target_label)

# %% label_flip_rate
from remos_hf import label_flip_rate

flipped = label_flip_rate(predictions, labels, target_label=1)

# %% excess_dir, Difference
from remos_hf import Difference, excess_dir

excess = excess_dir(dir_, floor)
assert isinstance(excess, Difference)

# %% relative_accuracy, Ratio
from remos_hf import Rate, Ratio, relative_accuracy

relative = relative_accuracy(Rate.of(80, 100), Rate.of(90, 100))
assert isinstance(relative, Ratio)

# %% relative_dir
from remos_hf import Rate, relative_dir

relative = relative_dir(Rate.of(10, 100), Rate.of(90, 100))

# %% wilson_interval
from remos_hf import wilson_interval

low, high = wilson_interval(8, 10)

# %% bootstrap_interval
from remos_hf import bootstrap_interval

low, high = bootstrap_interval([0, 1, 1, 0, 1, 1], statistic=lambda drawn: drawn.mean(-1), seed=0)

# %% artifact_nlp_dir
from remos_hf import artifact_nlp_dir

f1 = artifact_nlp_dir([1, 1, 0], [0, 0, 0], target_label=1)  # what the NLP tables of ReMoS call DIR

# %% artifact_nlp_dir_from_rate
from remos_hf import artifact_nlp_dir_from_rate

f1 = artifact_nlp_dir_from_rate(0.5)

# %% rate_from_artifact_nlp_dir
from remos_hf import rate_from_artifact_nlp_dir

rate = rate_from_artifact_nlp_dir(0.67)

# %% metric_path
import evaluate

from remos_hf import metric_path

metric = evaluate.load(metric_path("label_flip_rate"))
metric.compute(predictions=[1, 1, 0], references=[0, 0, 0], target_label=1)

# %% evaluate_transfer
from remos_hf import evaluate_transfer

report = evaluate_transfer(
    {"finetune": student, "remos": trainer.model},
    teacher=teacher,
    dataset=test,
    defects={"word": word},
    task=task,
    seed=0,
)

# %% DefectReport
from remos_hf import DefectReport

report.save("report.json")
print(DefectReport.load("report.json").to_markdown())

# %% write_html
from remos_hf import write_html

write_html(report, "report.html")

# %% log_defects
from remos_hf import log_defects

log_defects(trainer, report)  # to TensorBoard and whatever else the trainer reports to

# %% Reactivation, reactivate
from remos_hf import Reactivation, reactivate

plan = Reactivation(counts=(0, 4), num_clean=4, epochs=1)
rates = reactivate(student, word, train, test=test, exposed=exposed, task=task, plan=plan)

# %% anatomy
from remos_hf import anatomy

inside = anatomy(teacher.state_dict(), student, relevant=relevant)

# %% StudentPlan
from remos_hf import Random, StudentPlan

plans = {"random 0.9": StudentPlan(Random(0.9)), "faster": StudentPlan(Finetune(), lr_factor=3.0)}

# %% standard_students
from remos_hf import standard_students

plans = standard_students([0.9])  # ReMoS beside all that must be beaten
plans = standard_students([0.9], rules=["remos", "delta", "subspace+guided"])  # or what is named, of STRATEGIES

# %% Recipe, StudentTuner
from remos_hf import Recipe, StudentTuner

recipe = Recipe(learning_rate=1e-3, epochs=1, batch_size=16, use_cpu=True)
tuner = StudentTuner(task, recipe.arguments)

# %% Audit, run_audit
from remos_hf import Audit, Finetune, StudentPlan, load_teacher, run_audit, with_new_head

audit = Audit(
    name="toy",
    task=task,
    attacker=train,
    student=train,
    dev=test,
    test=test,
    defects={"word": word},
    students={"finetune": StudentPlan(Finetune())},
    seeds=[0],
    load_teacher=lambda seed: load_teacher("teacher"),
    teacher_args=lambda seed, folder: recipe.arguments(seed, folder),
    start_student=lambda teacher, seed: with_new_head(teacher, 2, seed=seed),
    fine_tune=tuner,
)
audited = run_audit(audit, "audit")  # killed, it goes on where it was

# %% report_of
from remos_hf import report_of

so_far = report_of(audit, "audit")  # what is done so far

# %% read_data
from remos_hf import read_data

train.to_csv("train.csv")
samples = read_data("train.csv")  # or parquet, folders of images, a data set of the Hub

# %% Sidecars
from remos_hf import Sidecars

record = Sidecars.load("student")
print(record.config["strategy"])

# %% model_card
from remos_hf import model_card

print(model_card(record, repo_id="you/student"))

# %% eval_result_files
from remos_hf import eval_result_files

weights = report.records[0]["given"]["weights"]
files = eval_result_files(report, weights=weights, benchmark="you/defect-inheritance")

# %% push_to_hub, Pushed
from remos_hf import Pushed, push_to_hub

pushed = push_to_hub("student", "you/student", dry_run=True)
assert isinstance(pushed, Pushed)
print(pushed.files)

# %% weight_scores
from remos_hf import profile_reference, weight_scores

reference = profile_reference(teacher, dataloader)
scores = weight_scores(teacher, "contributions", [next(iter(dataloader))], reference=reference, outputs=1)

# %% highest_scoring
from remos_hf import highest_scoring, weight_scores

kept = highest_scoring(teacher, weight_scores(teacher, "magnitude"), 0.4)

# %% profile_mean_inputs
from remos_hf import profile_mean_inputs

means = profile_mean_inputs(teacher, dataloader)

# %% MeanInputs
from remos_hf import MeanInputs, profile_mean_inputs

means: MeanInputs = profile_mean_inputs(teacher, dataloader)
groups, columns = means.columns["classifier.weight"].shape

# %% prune_outside
from remos_hf import highest_scoring, profile_mean_inputs, prune_outside, weight_scores

kept = highest_scoring(teacher, weight_scores(teacher, "magnitude"), 0.4)
small = prune_outside(copy.deepcopy(teacher), kept, means=profile_mean_inputs(teacher, dataloader))

# %% fine_tune_pruned
from remos_hf import fine_tune_pruned, highest_scoring, prune_outside, weight_scores

kept = highest_scoring(teacher, weight_scores(teacher, "magnitude"), 0.4)
small = prune_outside(copy.deepcopy(teacher), kept)
fine_tune_pruned(
    small,
    kept,
    tokenized,
    optimizer=lambda model: torch.optim.AdamW(model.parameters(), 1e-4),
    epochs=1,
    collate_fn=DataCollatorWithPadding(tokenizer),
)

# %% keep_pruned
from remos_hf import highest_scoring, keep_pruned, prune_outside, weight_scores

kept = highest_scoring(teacher, weight_scores(teacher, "magnitude"), 0.4)
small = prune_outside(copy.deepcopy(teacher), kept)
optimizer = keep_pruned(torch.optim.AdamW(small.parameters(), 1e-4), small, kept)  # for a loop of your own

# %% class_accuracy
from remos_hf import class_accuracy

found = class_accuracy(teacher, dataloader, classes=[1])

# %% ClassAccuracy
from remos_hf import ClassAccuracy, class_accuracy

found: ClassAccuracy = class_accuracy(teacher, dataloader, classes=[1])
print(found.target.value, found.among.value, found.others.value)

# %% hide_weights
from remos_hf import hide_weights, highest_scoring, weight_scores

given_away = copy.deepcopy(teacher)
hidden = hide_weights(given_away, highest_scoring(teacher, weight_scores(teacher, "magnitude"), 0.1))

# %% HiddenWeights
from remos_hf import HiddenWeights, hide_weights, highest_scoring, weight_scores

given_away = copy.deepcopy(teacher)
hidden = hide_weights(given_away, highest_scoring(teacher, weight_scores(teacher, "magnitude"), 0.1))
hidden.save_pretrained("kept_apart")
HiddenWeights.from_pretrained("kept_apart").put_back(given_away)

# %% relearn
from remos_hf import hide_weights, highest_scoring, relearn, weight_scores

given_away = copy.deepcopy(teacher)
hide_weights(given_away, highest_scoring(teacher, weight_scores(teacher, "magnitude"), 0.1))
relearn(
    given_away,
    tokenized,
    optimizer=lambda model: torch.optim.AdamW(model.parameters(), 1e-4),
    epochs=1,
    collate_fn=DataCollatorWithPadding(tokenizer),
)

# %% effective_path
from remos_hf import effective_path

path_of_one = effective_path(teacher, [next(iter(dataloader))])
print(path_of_one.share_in_slice)

# %% InputFeatures, Observed, last_layers
from remos_hf import InputFeatures, Observed, last_layers

features = InputFeatures("slice", last_layers(teacher, next(iter(dataloader))), reference)
seen = features.of(teacher, dataloader)
assert isinstance(seen, Observed)

# %% InputDetector
from remos_hf import InputDetector

half = len(seen) // 2
detector = InputDetector.fit(seen[:half], seen[half:])  # clean inputs, and attacked ones
flagged = detector.flags(seen)

# %% Detection, detection_of
from remos_hf import Detection, detection_of

detection = detection_of(detector.scores(seen[:half]), detector.scores(seen[half:]))
assert isinstance(detection, Detection)
print(detection.recall, detection.false_alarms, detection.auroc)

# %% attack_images
from remos_hf import ImageInput, attack_images, image_classifier

attacked = attack_images(
    image_classifier("test_resnet", num_labels=2, pretrained=False),
    ImageInput((32, 32)),
    torch.rand(2, 3, 32, 32),
    "pgd_8",
)

# %% RemosError
from remos_hf import RemosError, choose_slice

try:
    choose_slice(torch.nn.Linear(2, 2), profile, slice_ratio=0.9)
except RemosError as error:
    print(error)

# %% LayerMismatchError
from remos_hf import LayerMismatchError, choose_slice

try:
    choose_slice(five_stars.bert.encoder, profile, slice_ratio=0.9)
except LayerMismatchError as error:
    print(error)

# %% TeacherMismatchError
from remos_hf import TeacherMismatchError, reset_outside

try:
    reset_outside(copy.deepcopy(student), relevant)  # it was reset above, and is the teacher no more
except TeacherMismatchError as error:
    print(error)

# %% NonFiniteError
from remos_hf import NonFiniteError, profile_coverage

broken = copy.deepcopy(teacher)
torch.nn.init.constant_(broken.bert.encoder.layer[0].output.dense.weight, float("nan"))
try:
    profile_coverage(broken, dataloader)
except NonFiniteError as error:
    print(error)

# %% UnsupportedModelError
from remos_hf import UnsupportedModelError, choose_slice

try:
    choose_slice(copy.deepcopy(teacher).to("meta"), slice_ratio=0.9, rule="random")
except UnsupportedModelError as error:
    print(error)

# %% CorruptFileError
from remos_hf import CorruptFileError, CoverageProfile

Path("cut.safetensors").write_bytes(path.read_bytes()[:100])
try:
    CoverageProfile.load("cut.safetensors")
except CorruptFileError as error:
    print(error)
