"""Tests of the report's sections: their numbers by hand, and what they conclude."""

from pathlib import Path

import pytest
from made_runs import make_run, make_study, scores

import report
import report_lab
import report_lost
import report_models
import report_page
import report_sweeps


def test_welch_decides_the_verdict() -> None:
    a, b = [0.90, 0.91, 0.92], [0.80, 0.81, 0.82]
    assert report_models.compare("a", a, "b", b).text.startswith(
        "a beats b (0.9100 ± 0.0100 against 0.8100 ± 0.0100, difference +0.1000 ± 0.0227)"
    )  # t of 4 degrees of freedom, 2.776, times the root of 2 · 0.01² / 3
    assert report_models.compare("b", b, "a", a).text.startswith("b scores lower than a (")
    assert report_models.compare("a", a, "b", [0.7, 0.9, 1.0]).certainty == "cannot tell"
    one = report_models.compare("a", a, "b", [0.8]).text
    assert one.startswith("a scores 0.9100 ± 0.0100, b 0.8000. So few runs, 3 and 1, cannot")


def test_accuracy_of_background_alone(tmp_path: Path) -> None:
    study = make_study([make_run("tuned", 0, 0.8)], tmp_path)
    answer = report_models.answer_accuracy(study)
    assert answer.text.startswith("No, mean IoU suits better. Predicting background everywhere")
    assert "scores an accuracy of 0.8600, but a mean IoU of 0.2150." in answer.text  # 0.86 / 4
    assert answer.certainty == "sure"


def test_augmentation_is_chosen_on_validation_and_judged_on_the_test_split(tmp_path: Path) -> None:
    runs = [make_run("tuned", seed, 0.80 + seed / 100) for seed in (0, 1)]
    for seed in (0, 1):
        runs.append(make_run("augment/flip-0.3", seed, 0.90 + seed / 100))
        chosen = make_run("augment/flip-0.5", seed, 0.95)
        chosen.test["mean_iou"] = 0.5  # best on validation, worst on the test split
        runs.append(chosen)
    text = report_sweeps.answer_augmentation(make_study(runs, tmp_path)).text
    assert text.startswith("No. `flip-0.5` scores lower than no augmentation (0.5000")
    assert "chose `flip-0.5` from 2 tried. On the test split 1 of them scored" in text
    for run in runs:
        if run.experiment == "augment/flip-0.3":
            run.test["mean_iou"] = 0.4
    text = report_sweeps.answer_augmentation(make_study(runs, tmp_path)).text
    assert "On the test split all of them scored lower" in text
    runs = [run for run in runs if run.experiment != "augment/flip-0.3"]
    text = report_sweeps.answer_augmentation(make_study(runs, tmp_path)).text
    assert "chose" not in text  # from one
    for seed in (0, 1):  # the very same scores: the same augmentation by another name
        runs.append(make_run("augment/flip-0.8", seed, 0.95))
    text = report_sweeps.answer_augmentation(make_study(runs, tmp_path)).text
    assert "chose" not in text


def test_flipped_tuned_is_no_run_without_augmentation(tmp_path: Path, no_drawing: None) -> None:
    runs = [make_run("tuned", seed, 0.8, horizontal_flip=0.7) for seed in (0, 1)]
    runs += [make_run("augment/flip-0.3", seed, 0.9) for seed in (0, 1)]
    assert report_sweeps.answer_augmentation(make_study(runs, tmp_path)) is None
    runs += [make_run("augment/no-augmentation", seed, 0.7 + seed / 100) for seed in (0, 1)]
    study = make_study(runs, tmp_path)
    answer = report_sweeps.answer_augmentation(study)
    assert "beats no augmentation (0.9000 ± 0.0000 against 0.7050" in answer.text
    for run in runs[:2]:
        run.config["horizontal_flip"] = 0.0  # now tuned and no-augmentation are the same
    answer = report_sweeps.answer_augmentation(make_study(runs, tmp_path))
    assert "`flip-0.3` beats no augmentation" in answer.text and "chose" not in answer.text
    for run in runs[:2]:
        run.config["horizontal_flip"] = 0.7
    text = report_sweeps.details_augmentation(study)
    assert "| tuned (horizontal flip 0.7) | 0.8000 ± 0.0000 | 2 | none | 0.9878 |" in text
    choices = report_lab.section_choices(study)
    assert "**Horizontal flips** (test split). `no-augmentation` has none." in choices
    assert "`no-augmentation` scores lower than `tuned` (0.7050 " in choices
    runs = [make_run("tuned", 0, 0.9)]
    runs.append(make_run("augment/horizontal-flip-0.7", 0, 0.8, horizontal_flip=0.7))
    choices = report_lab.section_choices(make_study(runs, tmp_path))
    assert choices.count("Horizontal flips") == 1 and "`tuned` has none." in choices


def test_factors_are_sorted_by_their_range(tmp_path: Path, no_drawing: None) -> None:
    runs = [make_run("tuned", seed, 0.90 + seed / 1000) for seed in (0, 1)]
    settings = {"width-half": 0.8, "width-double": 0.95, "kernel-5": 0.85, "grid-0.1-half": 0.1}
    for name, iou in settings.items():
        runs += [make_run(f"tune/{name}", seed, iou + seed / 1000) for seed in (0, 1)]
    width, kernel = report_sweeps.find_factors(make_study(runs, tmp_path))
    assert (width.name, kernel.name) == ("width", "kernel")
    assert list(width.scores) == ["width-double", "tuned", "width-half"]
    assert width.spread == pytest.approx(0.15) and kernel.spread == pytest.approx(0.05)
    assert "| width | 3 | width-half: 0.8005 " in report_sweeps.factors_table([width, kernel])
    text = report_sweeps.section_tuning(make_study(runs, tmp_path))
    assert "Of all settings, `width-double` scores highest. `width-double` beats `tuned`" in text
    runs.append(make_run("tune/adamw", 0, 0.2))  # one run: nobody knows how much such runs scatter
    study = make_study(runs, tmp_path)
    assert report_sweeps.find_factors(study)[0].name == "adamw"
    assert "adamw" not in report_sweeps.section_tuning(study)


def test_losses_are_compared_on_validation(tmp_path: Path) -> None:
    runs = [make_run("tuned", seed, 0.7 + seed / 100) for seed in (0, 1)]
    runs += [make_run("tune/loss-class", seed, 0.9 + seed / 100) for seed in (0, 1)]
    study = make_study(runs, tmp_path)
    answer = report_lost.answer_loss(study).text
    assert answer.startswith("`loss-class` beats the lab's loss (0.9050 ± 0.0071 against 0.7050")
    assert report_lost.section_loss(study) == "Both are scored on the validation split."
    runs += [make_run("heads/tuned", 0, 0.4), make_run("heads/tuned-loss-per-class", 0, 0.9)]
    runs[-2].history[-1]["validation"]["dead_classes"] = ["square"]
    text = report_lost.section_loss(make_study(runs, tmp_path))
    assert (
        "in 1 of 1 runs with the lab's loss, and in 0 of 1 runs of `tuned-loss-per-class`" in text
    )
    assert "1 of 1 and 0 of 1 end with a class whose IoU is below" in text


def test_flips_are_compared_with_no_augmentation(tmp_path: Path) -> None:
    runs = [make_run("tuned", seed, 0.90 + seed / 1000) for seed in (0, 1)]
    runs += [make_run("augment/flip-0.5", seed, 0.90 + seed / 1000) for seed in (0, 1)]
    assert report_sweeps.answer_flips(make_study(runs, tmp_path)) is None
    name = "augment/horizontal-flip-0.7"
    runs += [make_run(name, seed, 0.8 + seed / 1000, horizontal_flip=0.7) for seed in (0, 1)]
    study = make_study(runs, tmp_path)
    assert report_sweeps.answer_flips(study).text.startswith("Probably because they replaced")
    text = report_sweeps.section_flips(study)
    assert text.startswith("`horizontal-flip-0.7` scores lower than no augmentation (0.8005 ")
    assert "`flip-0.5` beats `horizontal-flip-0.7` (0.9005" in text
    for run in runs[2:4]:
        run.test["mean_iou"] += 0.05  # now vertical flips help by themselves
    assert report_sweeps.answer_flips(make_study(runs, tmp_path)).certainty == "cannot tell"
    for run in runs[2:4]:
        run.test["mean_iou"] -= 0.3  # now they hurt more than horizontal ones
    assert report_sweeps.answer_flips(make_study(runs, tmp_path)).certainty == "cannot tell"


def test_jitter_is_compared_with_no_augmentation(tmp_path: Path) -> None:
    runs = [make_run("tuned", seed, 0.9 + seed / 100) for seed in (0, 1)]
    runs += [make_run("augment/jitter", seed, 0.7 + seed / 100) for seed in (0, 1)]
    answer = report_sweeps.answer_jitter(make_study(runs, tmp_path)).text
    assert answer.startswith("No. `jitter` scores lower than no augmentation (0.7050 ")


def test_heads_are_counted_by_step(tmp_path: Path, no_drawing: None) -> None:
    runs = [make_run("heads/tuned", 0, 0.4, crop=0), make_run("heads/tuned", 1, 0.9, crop=0)]
    runs.append(make_run("heads/tuned-wide", 0, 0.9, crop=0))
    runs[0].history[-1]["validation"]["dead_classes"] = ["square"]
    for run in runs:
        run.config["images_per_epoch"] = 0  # every image once
    study = make_study(runs, tmp_path)
    text = report_lost.details_heads(study)
    assert "| model | runs | 5 steps | 10 steps | class below 0.5 at the end |" in text
    assert "| tuned | 2 | 2 | 1 | 1 |" in text and "| tuned-wide | 1 | 1 | 0 | 0 |" in text
    text = report_lost.section_heads(study)
    assert "Runs that end with a class below 0.5: `tuned` 1 of 2, `tuned-wide` 0 of 1." in text
    answer = report_lost.answer_heads(study).text
    assert answer.startswith("In 1 of 2 runs of `tuned` with the lab's start, some class is in no")
    assert "is in no prediction after 10 steps" in answer


def test_overfitting_names_the_first_perfect_epoch(tmp_path: Path, no_drawing: None) -> None:
    name = "overfit/one-batch-tuned"
    study = make_study([make_run(name, 0, 0.9996), make_run(name, 1, 0.9)], tmp_path)
    text = report_sweeps.details_overfitting(study)
    assert "| one-batch-tuned | all | 2, never | 0.9498 ± 0.0704 |" in text
    answer = report_sweeps.answer_overfitting(study)
    assert "1 of 2 runs learnt two images by heart" in answer.text
    assert answer.text.startswith("Not that bad, with another loss than the lab's.")  # 0.9996
    study.overfit[name][0].history[-1]["validation"]["mean_iou"] = 0.4
    assert report_sweeps.answer_overfitting(study).text.startswith("Very bad, with another loss")


def test_a_metric_never_reset_is_a_running_average(tmp_path: Path, no_drawing: None) -> None:
    text = report_lab.section_running_average(make_study([make_run("tuned", 0, 0.8)], tmp_path))
    assert "scores 0.8000 on the validation split" in text  # the epochs have 0.4 and 0.8
    assert "The average over its 2 epochs is 0.6000." in text


def test_runs_that_never_predicted_a_class_are_counted(tmp_path: Path) -> None:
    runs = [make_run("tuned", 0, 0.8), make_run("best", 0, 0.8), make_run("heads/tuned", 0, 0.8)]
    runs[1].history[0]["validation"]["dead_classes"] = []
    text = report_lost.count_never_predicted(make_study(runs, tmp_path))
    assert text.startswith("In 1 of 2 runs some class was never predicted")
    assert "At the end of the last epoch it was so in 0." in text
    assert text.endswith("runs of `tuned`.")


def test_the_deepest_fall_is_told(tmp_path: Path, no_drawing: None) -> None:
    runs = [make_run("tuned", 0, 0.8, seen=44), make_run("tuned-drop-last", 0, 0.9, seen=40)]
    lower = {"validation": scores(0.3)}
    runs[0].history += [lower, runs[0].history[-1]]  # 0.4, 0.8, 0.3, 0.8
    text = report_lab.section_last_batch(make_study(runs, tmp_path))
    assert "so far: 0.500 with `tuned`, 0.000 with `tuned-drop-last` (seed 0)." in text
    other = make_run("tuned", 1, 0.8, seen=44)  # ends with one image as well, and never falls
    text = report_lab.section_last_batch(make_study([*runs, other], tmp_path))
    assert "(seed 0). With other seeds of `tuned` it is 0.000." in text
    assert "- **A last batch of one image**" in report_lab.section_choices(
        make_study(runs, tmp_path)
    )
    runs[0].validation["images_seen"] = 40  # no batch of one image
    study = make_study(runs, tmp_path)
    assert report_lab.section_last_batch(study) is None
    assert report_lab.section_choices(study) is None


def test_jumps_of_the_loss_are_counted_by_last_batch(tmp_path: Path) -> None:
    assert report_lab.find_jumps([0.9, 0.2, 0.7, 0.1, 0.1, 0.31]) == [3, 6]
    runs = [make_run("tuned", seed, 0.8, seen=22, batch_size=10) for seed in (0, 1)]  # 11 an epoch
    assert report_lab.answer_last_batch(make_study(runs, tmp_path)) is None
    runs.append(make_run("tuned-drop-last", 0, 0.8, seen=20, batch_size=10))
    runs[0].history[1]["validation"]["loss"] = 2.0  # 0.6 before
    study = make_study(runs, tmp_path)
    answer = report_lab.answer_last_batch(study)
    assert answer.certainty == "likely"
    assert "in 1 of our 2 runs that end each epoch with a batch of one image" in answer.text
    assert "in 0 of our 1 others (`tuned-drop-last`)" in answer.text
    assert "| `tuned`, seed 0 | one image | 2 |" in report_lab.details_last_batch(study)
    assert report_lab.shared_jump(runs) is None
    later = make_run("tuned", 0, 0.8)
    later.history += [{"validation": {"loss": 2.0}}]  # 0.6, 0.2, 2.0
    assert report_lab.shared_jump([runs[0], runs[0], later, runs[2], runs[1]]) == (
        "Runs with the same seed end each epoch with the same image. Of these runs, 3 of 4 with"
        " seed 0 jump, 2 of them in epoch 2, and 0 of 1 with other seeds."
    )
    assert report_lab.shared_jump([runs[0], runs[0]]).endswith("2 of them in epoch 2.")
    runs[2].history[1]["validation"]["loss"] = 2.0
    runs.append(make_run("heads/tuned", 0, 0.8))  # of few images: no control
    answer = report_lab.answer_last_batch(make_study(runs, tmp_path))
    assert (
        answer.certainty == "cannot tell" and "of our 1 others (`tuned-drop-last`)" in answer.text
    )


def test_the_labs_batch_is_shown_if_it_was_scored(tmp_path: Path) -> None:
    run = make_run("tuned", 0, 0.8)
    study = make_study([run], tmp_path)
    assert report_lab.section_fifty_images(study) is None
    run.test["lab_batch"], run.test["lab_batch_training_mode"] = 0.81, 0.82
    text = report_lab.section_fifty_images(study)
    assert "| tuned | 0.8000 | 0.8100 | 0.8200 | 0.9878 |" in text


def test_blurred_masks_need_runs_that_had_them(tmp_path: Path) -> None:
    runs = [make_run("augment/blur-0.8-clean-masks", 0, 0.9), make_run("augment/blur-0.8", 0, 0.8)]
    study = make_study(runs, tmp_path)
    assert report_lab.section_choices(study) is None  # older runs of this name have sharp masks
    runs[1].config["blur_masks"] = True
    text = report_lab.section_choices(study)
    assert "- **Blurred masks** (test split). `blur-0.8-clean-masks` leaves the masks" in text


def test_a_choice_is_judged_on_a_split_that_all_its_runs_have(tmp_path: Path) -> None:
    runs = [make_run("tune/head-wide", 0, 0.9), make_run("tuned", 0, 0.8)]
    runs[0].test = runs[1].test  # scored by hand
    runs.append(make_run("tune/head-wide", 1, 0.9))
    text = report_lab.section_choices(make_study(runs, tmp_path))
    assert "as narrow as the classes** (validation split, `make tune`). `head-wide` has" in text


def test_equal_models_score_the_same(tmp_path: Path) -> None:
    runs = [make_run(name, seed, 0.21) for name in ("initial", "modified") for seed in (0, 1)]
    answer = report_models.answer_models(make_study(runs, tmp_path))
    assert answer.text == "`initial` and `modified` score the same."
    assert answer.certainty == "cannot tell" and answer.short is None


def test_own_data_get_no_facts_about_the_labs(tmp_path: Path, no_drawing: None) -> None:
    runs = [make_run(name, 0, 0.8) for name in ("tuned", "augment/flip-0.5", "augment/jitter")]
    runs.append(make_run("augment/horizontal-flip-0.7", 0, 0.7, horizontal_flip=0.7))
    for run in runs:
        run.config["classes"] = {"water": [0, 0, 0], "lily": [255, 255, 255]}
    study = make_study(runs, tmp_path)
    assert report_sweeps.answer_flips(study) is None and report_sweeps.section_flips(study) is None
    assert report_sweeps.answer_jitter(study) is None
    text = report.page_of_folder(study, [])
    assert "repeats its experiments with a fourth model, `best`, on other images." in text
    assert "triangles of the data point right" not in text
    for run in runs:
        run.config["vertical_flip"] = 0.5  # for all runs: none is without augmentation
    study = make_study(runs, tmp_path)
    assert report_sweeps.augmentations(study)[1] is None
    assert "no augmentation" not in report_sweeps.details_augmentation(study)


def test_models_of_one_run_are_not_called_one_run_each_if_others_have_more(tmp_path: Path) -> None:
    runs = [make_run("best", seed, 0.90 + seed / 100) for seed in (0, 1, 2)]
    runs.append(make_run("initial", 0, 0.8))
    text = report_models.answer_models(make_study(runs, tmp_path)).text
    assert text.startswith("`best` scores highest. `best` scores 0.9100 ± 0.0100, `initial` 0.8")
    assert "So few runs, 3 and 1, cannot show which is better." in text


def test_experiments_of_one_name_in_two_folders_are_both_shown(tmp_path: Path) -> None:
    runs = [make_run("rate/tuned", 0, 0.9), make_run("random/tuned", 0, 0.8)]
    study = make_study([*runs, make_run("rate/best", 0, 0.95)], tmp_path)
    text = report_models.details_other_runs(study)
    assert "| rate/tuned | 0.9000 |" in text and "| random/tuned | 0.8000 |" in text
    assert "| best | 0.9500 |" in text


def test_longer_training_is_compared_with_half_of_it(tmp_path: Path) -> None:
    runs = [make_run("augment/flip-0.5", seed, 0.8 + seed / 100) for seed in (0, 1)]
    assert report_models.answer_longer(make_study(runs, tmp_path)) is None
    runs += [make_run("final", seed, 0.95 + seed / 100, seen=200) for seed in (0, 1)]
    study = make_study(runs, tmp_path)
    text = report_models.answer_longer(study).text
    assert text.startswith("Yes. `final` beats `flip-0.5` (0.9550 ± 0.0071 against 0.8050")
    assert "| final | 0.9550 ± 0.0071 | 2 | 0.9950 | 200 |" in report_models.section_longer(study)
    assert "final" not in (report_models.details_other_runs(study) or "")
    for run in runs:
        run.validation["images_seen"] = 100  # as by SET="epochs=3": now both have one length
    assert report_models.answer_longer(make_study(runs, tmp_path)) is None


def test_runs_of_their_own_length_are_called_so(tmp_path: Path, no_drawing: None) -> None:
    studies = []
    for profile in ("full", "quick"):
        studies.append(make_study([make_run("overfit/one-batch-tuned", 0, 0.9996)], tmp_path))
        studies[-1].profile = profile
    section = next(part for part in report_page.SECTIONS if part.targets == "overfit")
    assert "**In runs of their own length** (`make overfit DATA=afo PROFILE=full`)" in (
        report_page.write_section(section, studies)
    )
    assert report_page.in_short(studies).endswith("| sure | own length |")
