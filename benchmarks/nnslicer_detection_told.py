"""The words of benchmarks/nnslicer_detection.py: what its numbers say of the published claim."""

from collections.abc import Mapping
from typing import Any

Told = Mapping[str, Any]
HOW = {
    "none_shown": "no attack shown, as published",
    "shown": "all attacks shown",
    "others_shown": "only other attacks shown",
}
_PERFECT, _HIGH = 0.99, 0.9  # what a recall and a precision have to reach to be called so


def percent(one: Told) -> str:
    """Write a share with its interval."""
    if one["value"] is None:
        return "-"
    span = "" if one["low"] is None else f" [{100 * one['low']:.0f}, {100 * one['high']:.0f}]"
    return f"{100 * one['value']:.1f}{span}"


def decimal(one: Told) -> str:
    """Write a number in [0, 1] with its interval."""
    if one["value"] is None:
        return "-"
    span = "" if one["low"] is None else f" [{one['low']:.2f}, {one['high']:.2f}]"
    return f"{one['value']:.2f}{span}"


def apart(one: Told, other: Told) -> int:
    """Say whether one share is above the other by their intervals: 1, -1, or 0 where they meet."""
    if None in (one["low"], other["low"]):
        return 0
    return int(one["low"] > other["high"]) - int(one["high"] < other["low"])


def as_markdown(told: Told, names: Mapping[str, str]) -> str:
    """Write the table.

    Args:
        told: As `nnslicer_detection.gathered` gives it.
        names: What detectors look at, by key.
    """
    parts = ["# Detection by slices: is the published claim true?\n"]
    if "slice_class" in told["adversarial"]:
        parts += [*_claims(told), _adversarial(told, names)]
    for trigger, found in told["triggers"].items():
        parts.append(_trigger(trigger, found, names))
    return "\n".join([*parts, _setting(told)]) + "\n"


def _claims(told: Told) -> list[str]:
    found = told["adversarial"]
    published, one = found["slice_class"]["none_shown"], found.get("slice_global", {}).get("none_shown")
    lines = [_of_recall(published), _of_alarms(published), _of_errors(published), _of_noise(published)]
    if one is not None:
        lines.append(_of_reference(published, one))
    lines.append(_of_rivals(found))
    lines.append(_of_unseen(found))
    lines += [_of_trigger_claim(trigger, of) for trigger, of in told["triggers"].items()]
    return [_verdict(found), "", *(f"- {line}" for line in lines), ""]


def _verdict(found: Told) -> str:
    """Say whether the claim holds: what the paper says of its detector, and that it is attacks that it sees."""
    published = found["slice_class"]["none_shown"]
    recall, wrong = published["recall"], published["controls"]["wrong"]
    rivals = [found[name]["none_shown"] for name in ("effective_path", "feature_map") if name in found]
    better = [apart(published["mean"]["auroc"], one["mean"]["auroc"]) == 1 for one in rivals]
    parts = {
        "recall is perfect": recall["value"] >= _PERFECT,
        "precision is high": (published["mean"]["precision"]["value"] or 0) >= _HIGH,
        "it beats EffectivePath and feature maps": len(better) == 2 and all(better),
        "it flags attacked images more often than clean ones that the net gets wrong": apart(recall, wrong) == 1,
    }
    holds, fails = ([name for name, true in parts.items() if true is wanted] for wanted in (True, False))
    if not fails:
        return f"**The published claim holds here:** {'; '.join(holds)}."
    also = f" What holds: {'; '.join(holds)}." if holds else ""
    return (
        f"**The published claim does not hold under these conditions.** Not shown: that {'; that '.join(fails)}.{also}"
    )


def _of_recall(published: Told) -> str:
    recall = published["recall"]
    return (
        f"**Recall.** Trees as published (class reference, no attack "
        f"shown) flag {percent(recall)} % of the adversarial images."
    )


def _of_alarms(published: Told) -> str:
    clean, mean = published["controls"]["clean"], published["mean"]
    return (
        f"**Precision.** They flag {percent(clean)} % of the clean images that the net gets right; with one clean "
        f"image for each adversarial one the precision is {decimal(mean['precision'])}, F1 {decimal(mean['f1'])}, "
        f"AUROC {decimal(mean['auroc'])} (means over attacks)."
    )


def _of_errors(published: Told) -> str:
    clean, wrong = (published["controls"][name] for name in ("clean", "wrong"))
    sign, of_attacks = apart(wrong, clean), apart(wrong, published["recall"])
    if sign == 1:
        meant = "so what they see is, in part or in full, that the net errs, not that an image was attacked"
        meant += {0: "; the two rates cannot be told apart", 1: "; errors are flagged even more often", -1: ""}[
            of_attacks
        ]
    else:
        meant = "which cannot be told from their false alarms on images that it gets right"
    return f"**Errors.** Of the clean images that the net gets wrong they flag {percent(wrong)} %, {meant}."


def _of_noise(published: Told) -> str:
    noise, clean = (published["controls"][name] for name in ("noise", "clean"))
    told = {1: "more than", 0: "not to be told from", -1: "fewer than"}[apart(noise, clean)]
    return (
        f"**Noise.** Of images with noise of exactly an attack's size, on which the net's label stays, they flag "
        f"{percent(noise)} %: {told} clean ones."
    )


def _of_reference(published: Told, one: Told) -> str:
    ours, theirs = one["recall"], published["recall"]
    told = {1: "rises", 0: "cannot be told from that", -1: "falls"}[apart(ours, theirs)]
    return (
        f"**One reference for all.** Recall is {percent(ours)} % ({told}), false alarms "
        f"{percent(one['controls']['clean'])} %, AUROC {decimal(one['mean']['auroc'])} beside "
        f"{decimal(published['mean']['auroc'])} with the reference of the predicted class."
    )


def _of_rivals(found: Told) -> str:
    parts = []
    for how in ("none_shown", "others_shown"):
        own = found["slice_class"][how]["mean"]["auroc"]
        for key, name in (("effective_path", "EffectivePath"), ("feature_map", "feature maps"), ("logits", "logits")):
            if key in found and not (how == "none_shown" and key == "logits"):
                other = found[key][how]["mean"]["auroc"]
                told = {1: "better than", 0: "not to be told from", -1: "worse than"}[apart(own, other)]
                parts.append(f"{told} {name} ({decimal(other)}), {HOW[how]}")
    return f"**Beside the rivals**, slices (class reference) are by AUROC {'; '.join(parts)}."


def _of_unseen(found: Told) -> str:
    own = found["slice_class"]
    return (
        f"**Shown attacks.** Trees that saw every attack reach AUROC {decimal(own['shown']['mean']['auroc'])} on "
        f"slices; on attacks whose family they did not see {decimal(own['others_shown']['mean']['auroc'])}."
    )


def _of_trigger_claim(trigger: str, found: Told) -> str:
    own = found["slice_class"]
    parts = [
        f"{HOW[how].replace('attack', 'trigger') if how != 'others_shown' else 'shown PGD alone'}: "
        f"{percent(own[how]['recall'])} % caught at {percent(own[how]['by_attack']['trigger']['false_alarms'])} % "
        f"false alarms, AUROC {decimal(own[how]['mean']['auroc'])}"
        for how in HOW
        if how in own
    ]
    return f"**Trigger ({trigger}).** Slices, {'; '.join(parts)}."


def _adversarial(told: Told, names: Mapping[str, str]) -> str:
    found = told["adversarial"]
    lines = ["## Adversarial images\n"]
    for how, title in HOW.items():
        lines += [
            f"### {title[:1].upper()}{title[1:]}\n",
            "| looks at | recall % | false alarms % | errors flagged % | noise flagged % | precision | F1 | AUROC |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for key in found:
            of = found[key][how]
            controls = of.get("controls")
            shown = [percent(controls[name]) if controls else "-" for name in ("wrong", "noise")]
            shown = [percent(controls["clean"] if controls else of["mean"]["false_alarms"]), *shown]
            mean = [decimal(of["mean"][name]) for name in ("precision", "f1", "auroc")]
            lines.append(f"| {names[key]} | {percent(of['recall'])} | {' | '.join([*shown, *mean])} |")
        lines.append("")
    lines += [
        "### By attack\n",
        "AUROC on slices with the reference of the predicted class; in brackets recall % where no attack is shown.\n",
        "| attack | tried | changed the label | n a seed | l2 | no attack shown | all shown | family not shown |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    own = found["slice_class"]
    for name, of in told["attacks"]["attacks"].items():
        head = f"| {name} | {of['tried']} | {of['changed']} |"
        if name not in own["none_shown"]["by_attack"]:
            lines.append(f"{head} - | - | - | - | - |")
            continue
        cells = [own[how]["by_attack"][name] for how in HOW]
        size = cells[0]["recall"]["num_samples"] // max(1, len(told["seeds"]))
        cell = [decimal(one["auroc"]) for one in cells]
        cell[0] += f" ({percent(cells[0]['recall'])})"
        lines.append(f"{head} {size} | {of['l2']:.2f} | {' | '.join(cell)} |")
    return "\n".join(lines) + "\n"


def _trigger(trigger: str, found: Told, names: Mapping[str, str]) -> str:
    obeyed = ", ".join(f"{one} of {of}" for one, of in found["obeyed"])
    accuracy = ", ".join(f"{100 * one:.0f}" for one in found["accuracy"])
    lines = [
        f"## Trigger: {trigger}\n",
        f"{len(found['obeyed'])} teachers, one a seed: triggered images that they call the target label: {obeyed}; "
        f"accuracy {accuracy} %. Those that do not obey are no samples.\n",
        "| looks at | shown | recall % | false alarms % | clean of the target class flagged % | errors flagged % "
        "| noise flagged % | AUROC |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    shown = {"none_shown": "nothing", "shown": "the trigger", "others_shown": "PGD"}
    for key, name in names.items():
        for how in HOW:
            if how not in found[key]:
                continue
            of = found[key][how]
            cells = [of["recall"], of["by_attack"]["trigger"]["false_alarms"]]
            cells += [of["controls"][one] for one in ("target", "wrong", "noise")]
            auroc = decimal(of["mean"]["auroc"])
            lines.append(f"| {name} | {shown[how]} | {' | '.join(map(percent, cells))} | {auroc} |")
    return "\n".join(lines) + "\n"


def _setting(told: Told) -> str:
    sizes, counts = told["sizes"], told["attacks"]["counts"]
    absent = "; ".join(f"{name}: {why}" for name, why in told["absent"].items())
    return (
        "## What was done\n\n"
        f"ResNet-20 of CIFAR-10, all weights of its last convolution. {counts['shown']} images of train/ that it gets "
        f"right make the references and, 80 % of them a seed, the trees that see no attack; {counts['clean']} of test/ "
        f"that it gets right are attacked, {counts['wrong']} that it gets wrong are a control. Half of the attacked "
        "images, drawn by the seed, and all that was made of them is for testing; trees that are shown attacks grow on "
        "the other half, on as many attacked images as clean ones, each family of attacks alike. An attack that leaves "
        "the label is no sample. Precision, F1 and AUROC are of each attack beside the clean images that it was made "
        "of.\n\n"
        f"Intervals: 95 %, over {len(told['seeds'])} seeds of splits and trees (of triggers also of teachers); of "
        "shares they hold the test samples too. Seeds of adversarial images share images and attacks, so they say "
        f"little of other nets. Trigger teachers are trained {sizes['implanting'][1]} steps of 32 at 24 pixels.\n\n"
        f"Not measured, because no maintained package has them: {absent}. Attacks run fewer steps than published. "
        "No attack knew of the detector. Trees that see no attack give few scores but 0 and 1, so their AUROC is "
        "about the mean of recall and of the share of clean images that are not flagged."
    )
