"""Tests of tools/bench.py: a tiny run from end to end, what is timed. No timing is asserted."""

import re
import sys
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny

from config import load_config
from tools import bench


def test_tiny_run_in_float32(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(bench, "MATRIX", 64)
    options = ["--models", "tuned", "--rounds", "1", "--seconds", "0.01", "--device", "cpu"]
    settings = tiny(dataset, crop=16, precision="float32")
    monkeypatch.setattr(sys, "argv", ["bench", *options, "--set", *settings])
    # oneDNN prints each operation with its types, so that one in bfloat16 would be seen.
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        bench.main()
    printed = capfd.readouterr().out
    assert "convolution" in printed and "bf16" not in printed
    [line] = re.findall("^tuned .*", printed, re.MULTILINE)
    speed = r"([\d.]+) \([\d.]+–[\d.]+\)"
    share = r"\d+%"
    expected = rf"tuned +{speed} +{speed} +{speed} +{share} +{speed} +{share} +float32"
    textbook, ours, ratio, evaluation = map(float, re.fullmatch(expected, line).groups())
    assert min(textbook, ours, evaluation) > 0 and ratio == pytest.approx(ours / textbook, abs=0.1)


def test_textbook_loop_decodes_all_its_images_while_it_is_timed(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No worker is alive when the clock is read: it would have a head start, or slow the others."""
    workers = []

    def read_clock() -> float:
        workers.append(active_children())
        return float(len(workers))

    monkeypatch.setattr(bench, "timeit", SimpleNamespace(default_timer=read_clock))
    images_per_s = bench.train_textbook(load_config([], tiny(dataset)), torch.device("cpu"), 1)
    assert workers == [[], []]
    assert images_per_s == 8  # one batch in the one second of this clock


def test_arithmetic_is_counted_forward_and_backward(dataset: Path) -> None:
    """Backward takes twice as much: by weights and by inputs, except by those of the first conv."""
    stages = {"encoder": "[[4, 3]]", "decoder": "[[4, 3]]"}
    config = load_config([], tiny(dataset, **stages))
    first = 32 * 32 * 9 * 3 * 4
    second = 32 * 32 * 9 * 4 * 4
    decoder = 16 * 16 * 9 * 4 * 4  # each of its two convs and its up-sampling to 4 classes
    multiply_adds = 2 * first + 3 * second + 3 * 3 * decoder
    training, evaluation = bench.gflop_per_image(config)
    assert training == pytest.approx(2 * multiply_adds / 1e9)
    forward = first + second + 3 * decoder
    assert evaluation == pytest.approx(2 * forward / 1e9)
