"""What the report says: why the lab's curves look as they do, and answers to its questions.

Every sentence is made from the numbers of the runs at hand, and every number goes into `facts`.
"""

import re
from pathlib import Path

import figures
from collect import MODELS, Run, with_base
from evaluate import background_only
from tables import Blocks, judge, of, published, show, standard_error

HIGH_ACCURACY, LOW_IOU = 0.8, 0.5  # what is called high and poor in the first answer


# ---- why the lab's curves look as they do


def explanations(groups: dict[str, list[Run]], tested: dict, pictures: Path, facts: dict) -> Blocks:
    """Three figures: a metric that is never reset, 50 test images, dead classes."""
    blocks: Blocks = [("h2", "Why the lab's curves and numbers look as they do")]
    if "tuned" not in groups:
        blocks.append(("p", "Missing: the tuned model; `make train-tuned` makes it."))
    else:
        true = [e["validation"]["mean_iou"] for e in groups["tuned"][0].history]
        lines = {"each epoch by itself (true)": true, "never reset": figures.running_mean(true)}
        text = (
            "**A metric that is never reset turns into a running average.** The lab's metric "
            "object kept adding up, so each point of its curves is an average over all epochs so "
            f"far. Here the last epoch has {true[-1]:.4f}, the average over all {len(true)} epochs "
            f"{lines['never reset'][-1]:.4f}."
        )
        if "modified" in groups:
            before = [e["validation"]["mean_iou"] for e in groups["modified"][0].history]
            label = "never reset, carried over from modified"
            lines[label] = figures.running_mean(true, before)
            text += (
                " Some of the lab's runs even began with the state of the run before: such a curve "
                f"starts at {lines[label][0]:.4f} instead of {true[0]:.4f} and ends at "
                f"{lines[label][-1]:.4f}."
            )
        figures.running(pictures / "running-average.png", lines)
        facts["running_average"] = lines
        blocks.append(("p", text))
        blocks.append(
            ("figure", "running-average.png", "Validation mean IoU of tuned, lowest seed.")
        )
    if tested:
        name = "tuned" if "tuned" in tested["frames"] else next(iter(tested["frames"]))
        result = figures.bootstrap(tested["frames"][name], tested["groups"])
        whole, batch, new = (result[kind] for kind in ("whole", "batch", "batch of new"))
        lab = [r[0].config["published_iou"] for n, r in groups.items() if n in MODELS]
        lab = [value for value in lab if value is not None]
        wide = batch["high"] - batch["low"]
        text = (
            f"**{result['batch_images']} test images leave a wide interval.** The lab tested on "
            f"one shuffled batch of {figures.BATCH} images. Of {result['draws']:,} such batches "
            f"from this test split, 95 % score between {batch['low']:.4f} and "
            f"{batch['high']:.4f} with the very same {name} model, whose score on all "
            f"{result['images']} images is {result['score']:.4f}."
        )
        if len(lab) > 1:
            spread = max(lab) - min(lab)
            text += (
                f" That is {wide:.4f} wide; the lab's published models lie {spread:.4f} apart"
                + (", less than that: one batch cannot rank them." if spread < wide else ".")
            )
        text += (
            " Testing on every image removes that chance. Another stays: which sequences the split "
            f"happens to hold. With its {result['sequences']} sequences drawn anew (a bootstrap; "
            "frames of one sequence are alike) the whole split scores between "
            f"{whole['low']:.4f} and {whole['high']:.4f}, {result['batch_images']} frames of them "
            f"between {new['low']:.4f} and {new['high']:.4f}."
        )
        figures.intervals(pictures / "batch-of-50.png", result, name)
        facts["bootstrap"] = {"model": name} | {
            k: {e: v[e] for e in ("low", "high")} if isinstance(v, dict) else v
            for k, v in result.items()
        }
        blocks += [
            ("p", text),
            (
                "figure",
                "batch-of-50.png",
                f"Test mean IoU of {name}, lowest seed, "
                f"by which images it is tested on; {result['draws']:,} draws each.",
            ),
        ]
    rows, ever = [], 0
    first = [name for name in MODELS if name in groups]
    for name in (*first, *(name for name in groups if name not in first)):
        for one in groups[name]:
            epochs = [e["validation"]["dead_classes"] for e in one.history]
            ever += any(epochs)
            if any(epochs) or name in MODELS:
                rows.append((f"{name}, seed {one.seed}", epochs))
    total = sum(map(len, groups.values()))
    facts["dead_classes"] = dict(rows)
    blocks.append(
        (
            "p",
            "**Dead classes make runs inconsistent.** A class is dead while the model "
            "predicts it nowhere in the validation split: its IoU is 0, and accuracy hardly "
            "shows it. In the lab it came from the last decoder stage, no wider than there are "
            f"classes. Here {ever} of {total} runs had a dead "
            "class in some epoch.",
        )
    )
    if rows:
        classes = list(next(iter(groups.values()))[0].config["classes"])
        figures.dead_classes(pictures / "dead-classes.png", rows, classes)
        blocks.append(
            (
                "figure",
                "dead-classes.png",
                "Dead classes by epoch: the models compared, "
                "and every other run that had one. Names are cut to three letters.",
            )
        )
    return blocks


# ---- the lab's questions


def verdict(name: str, a: dict, other: str, b: dict) -> str:
    """In words: did the mean of `a` exceed that of `b`?"""
    gap, error = a["mean"] - b["mean"], standard_error(a, b)
    numbers = f"{name} has {show(a)}, {other} {show(b)} (difference {gap:+.4f})"
    return {
        "more": f"**Yes**: {numbers}, more than twice its standard error {error or 0:.4f}.",
        "less": f"**No, it did worse**: {numbers}, more than twice its standard error "
        f"{error or 0:.4f}.",
        "noise": f"**Not beyond seed noise**: {numbers}, within twice its standard error "
        f"{error or 0:.4f}.",
        "one seed": f'**Cannot be told from one seed**: {numbers}. `SEEDS="0 1 2"` adds seeds.',
    }[judge(a, b)]


def factors(groups: dict[str, list[Run]]) -> dict[str, dict[str, dict]]:
    """Varied factor → setting → validation mean IoU over seeds, of factors with two settings."""
    by_factor: dict[str, dict[str, list[Run]]] = {
        "model (the lab's three)": {n: groups[n] for n in MODELS[:3] if n in groups},
        "augmentation": with_base(groups, "augment", "none"),
    }
    tune = with_base(groups, "tune", "base")
    for name, runs in tune.items():
        # "learning-rate-0.001" varies the learning rate; a cell of the grid varies two factors
        if match := re.fullmatch(r"([a-z-]+)-[^-]+", name):
            factor = by_factor.setdefault(match[1].replace("-", " "), {})
            factor |= {"base": tune["base"]} if "base" in tune else {}
            factor[name] = runs
    return {
        factor: {n: of(runs, "mean_iou", "validation") for n, runs in settings.items()}
        for factor, settings in by_factor.items()
        if len(settings) > 1
    }


def answers(groups: dict[str, list[Run]], facts: dict) -> Blocks:
    """The lab's four questions, answered from these runs alone."""
    models = {name: groups[name] for name in MODELS if name in groups}
    given: dict[str, dict] = {}
    question = "Does high accuracy imply good performance?"
    if models:
        none = background_only(next(iter(models.values()))[0].test)
        a, i = none["pixel_accuracy"], none["mean_iou"]
        best = max(models, key=lambda name: of(models[name], "mean_iou")["mean"])
        shown = a >= HIGH_ACCURACY and i <= LOW_IOU
        text = (
            ("**No.**" if shown else "**Not shown by this data.**")
            + f" Predicting background everywhere has accuracy {a:.4f} and mean IoU {i:.4f} "
            f"(here, accuracy is high from {HIGH_ACCURACY} and mean IoU poor up to {LOW_IOU}). The "
            f"highest mean IoU, that of {best}, is {show(of(models[best], 'mean_iou'))}, its "
            f"accuracy {show(of(models[best], 'pixel_accuracy'))}: most pixels are background, so "
            "accuracy hardly sees the shapes."
        )
        given[question] = {"answer": text, "accuracy": a, "mean_iou": i, "best": best}
    else:
        given[question] = {"answer": "Missing: the models; `make report` makes them."}
    question = "Did the modified model beat the initial one?"
    if {"initial", "modified"} <= models.keys():
        a, b = of(models["modified"], "mean_iou"), of(models["initial"], "mean_iou")
        text = verdict("modified", a, "initial", b)
        lab = [published(models[name]) for name in ("modified", "initial")]
        text += f" The lab published {lab[0]} and {lab[1]}, of one run and one batch each."
        given[question] = {"answer": text, "modified": a, "initial": b}
    else:
        given[question] = {"answer": "Missing: `make train-initial train-modified` makes the runs."}
    question = "Did augmentation help?"
    augment = {n: of(r, "mean_iou") for n, r in with_base(groups, "augment", "none").items()}
    if "none" in augment and len(augment) > 1:
        none = augment.pop("none")
        best = max(augment, key=lambda name: augment[name]["mean"])
        text = verdict(
            f"the best of {len(augment)} augmentations, {best},", augment[best], "none", none
        )
        verdicts = [judge(stat, none) for stat in augment.values()]
        if "one seed" not in verdicts:
            text += (
                f" Beyond seed noise, {verdicts.count('more')} of {len(augment)} are better than "
                f"none and {verdicts.count('less')} worse. The best of several is picked for its "
                "luck, too."
            )
        given[question] = {"answer": text, "best": best, best: augment[best], "none": none}
    else:
        given[question] = {"answer": "Missing: `make augment` makes the runs."}
    question = "What had the greatest impact?"
    varied, rows, effect = factors(groups), [], {}
    for factor, settings in varied.items():
        low, high = (f(settings, key=lambda name: settings[name]["mean"]) for f in (min, max))
        effect[factor] = settings[high]["mean"] - settings[low]["mean"]
        beyond = {"more": "yes", "one seed": "one seed"}.get(
            judge(settings[high], settings[low]), "no"
        )
        rows.append(
            [
                factor,
                str(len(settings)),
                f"{low}: {show(settings[low])}",
                f"{high}: {show(settings[high])}",
                f"{effect[factor]:.4f}",
                beyond,
            ]
        )
    rows.sort(key=lambda row: -effect[row[0]])
    if len(rows) > 1:
        first, second = rows[:2]
        text = (
            f"**{first[0].capitalize()}**: its settings differ by {first[4]} in mean IoU on the "
            f"validation split, {first[2]} to {first[3]} (beyond seed noise: {first[5]}); next "
            f"comes {second[0]} with {second[4]}. A range depends on which settings were tried, "
            "and grows with their number."
        )
        given[question] = {"answer": text, "range": effect, "settings": varied}
    else:
        text = "Missing: two factors are needed; `make augment tune` makes the runs."
        given[question] = {"answer": text}
    facts["answers"] = given
    blocks: Blocks = [("h2", "The lab's questions")]
    for question, entry in given.items():
        blocks += [("h3", question), ("p", entry["answer"])]
    header = ["factor", "settings", "lowest", "highest", "range", "beyond seed noise"]
    return blocks + ([("table", header, rows)] if rows else [])
