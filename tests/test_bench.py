"""Tests of tools/bench.py: a tiny run from end to end, what is timed. No timing is asserted."""

import re
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny

from config import load_config
from tools import bench


def test_tiny_run_in_float32(script, dataset: Path) -> None:
    settings = tiny(dataset, crop=16, precision="float32")
    # oneDNN prints each operation with its types, so that one in bfloat16 would be seen.
    like_avx2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_VERBOSE": "1"}
    options = ("--models", "tuned", "--rounds", 1, "--seconds", 0.01, "--device", "cpu")
    done = script("-m", "tools.bench", *options, "--set", *settings, **like_avx2)
    assert done.returncode == 0, done.stderr
    assert "convolution" in done.stdout and "bf16" not in done.stdout
    [line] = re.findall("^tuned .*", done.stdout, re.MULTILINE)
    speed = r"([\d.]+) \([\d.]+–[\d.]+\)"
    cells = re.fullmatch(rf"tuned +{speed} +{speed} +{speed} +(\d+) +\d+% +float32", line)
    textbook, ours, ratio, _ = map(float, cells.groups())
    assert min(textbook, ours) > 0 and ratio == pytest.approx(ours / textbook, abs=0.1)


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
    assert bench.gflop_per_image(config) == pytest.approx(2 * multiply_adds / 1e9)
