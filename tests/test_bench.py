"""Tests of tools/bench.py: a tiny run from end to end, what is timed. No timing is asserted."""

import json
import re
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace

import torch
from conftest import tiny

from config import load_config
from tools import bench


def test_tiny_run_in_float32(script, dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    settings = tiny(dataset, crop=16, precision="float32")
    # oneDNN prints each operation with its types, so that one in bfloat16 would be seen.
    like_avx2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_VERBOSE": "1"}
    models = ("--models", "tuned", "--rounds", 2, "--seconds", 0.01)
    where = ("--device", "cpu", "--json", out)
    done = script("-m", "tools.bench", *models, *where, "--set", *settings, **like_avx2)
    assert done.returncode == 0, done.stderr
    assert "convolution" in done.stdout and "bf16" not in done.stdout
    result, neighbour = json.loads(out.read_text())
    assert (result.pop("name"), result.pop("precision")) == ("tuned", "float32")
    speeds = {"images_per_s", "baseline_images_per_s", "ratio", "gflop_per_s", "share_of_peak"}
    assert set(result) == speeds and min(result.values()) > 0
    assert len(neighbour["shares"]) == 2 and min(neighbour["shares"]) > 0
    assert re.search("^tuned .* float32 channels_last$", done.stdout, re.M)


def test_baseline_decodes_all_its_images_while_it_is_timed(dataset: Path, monkeypatch) -> None:
    alive = []  # workers whenever the clock is read: later they would slow the other loop
    clock = {"default_timer": lambda: alive.append(active_children()) or len(alive)}
    monkeypatch.setattr(bench, "timeit", SimpleNamespace(**clock))
    bench.train_baseline(load_config([], tiny(dataset)), torch.device("cpu"), 1)
    assert alive == [[], []]
