"""Tests of schedule.py: the order of images, seeds, and the learning rate."""

import pytest
import torch

from schedule import derive_seed, epoch_order, make_scheduler


@pytest.mark.parametrize(("total", "per_epoch", "epochs"), [(7, 7, 3), (5, 12, 4), (20, 3, 15)])
def test_every_pass_shows_every_image_once(total: int, per_epoch: int, epochs: int) -> None:
    parts = [epoch_order(epoch, per_epoch, total, seed=3) for epoch in range(epochs)]
    assert all(part.shape == (per_epoch,) and part.dtype == torch.int64 for part in parts)
    walk = torch.cat(parts)
    assert torch.equal(walk, epoch_order(0, per_epoch * epochs, total, seed=3))
    for one_pass in walk.split(total):
        assert len(one_pass.unique()) == len(one_pass) and one_pass.max() < total
    assert len({tuple(part.tolist()) for part in walk.split(total)}) > 1


def test_seeds_of_seed_stream_and_number_differ() -> None:
    seeds = {derive_seed(s, stream, i) for s in range(4) for stream in "ab" for i in range(99)}
    assert len(seeds) == 4 * 2 * 99 and all(0 <= seed < 2**32 for seed in seeds)


def test_the_seed_decides_the_order() -> None:
    assert torch.equal(epoch_order(0, 20, 20, seed=3), epoch_order(0, 20, 20, seed=3))
    assert not torch.equal(epoch_order(0, 20, 20, seed=3), epoch_order(0, 20, 20, seed=4))


def walk(schedule: str, steps: int, warm_up: float) -> tuple[list[float], list[float], float]:
    """Step Adam with a peak of 0.01: rate and first beta before each step, and the last rate."""
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=0.01)
    scheduler = make_scheduler(optimizer, schedule, steps, warm_up)
    rates, betas = [], []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        betas.append(optimizer.param_groups[0]["betas"][0])
        optimizer.step()
        scheduler.step()
    return rates, betas, scheduler.get_last_lr()[0]


@pytest.mark.parametrize(
    ("steps", "warm_up"),
    [(1, 0.21), (2, 0.21), (5, 0.21), (10, 0.21), (100, 0.21), (1, 0.5), (4, 0.2), (99, 0.01)],
)
def test_one_cycle_falls_to_nothing(steps: int, warm_up: float) -> None:
    rates, _, last = walk("one_cycle", steps, warm_up)
    assert max(rates) <= 0.01 and last == pytest.approx(0.01 / 25 / 1e4)


def test_one_cycle_rises_to_its_peak_and_moves_beta_the_other_way() -> None:
    rates, betas, _ = walk("one_cycle", 100, 0.21)
    assert rates[0] == pytest.approx(0.01 / 25) and max(rates) == pytest.approx(0.01, rel=1e-3)
    assert rates.index(max(rates)) in (20, 21)  # a fifth of the way
    assert betas[0] == pytest.approx(0.95) and min(betas) == pytest.approx(0.85, abs=1e-3)
    assert betas.index(min(betas)) in (20, 21)


def test_constant_stays() -> None:
    rates, betas, last = walk("constant", 3, 0.21)
    assert rates == [0.01] * 3 and last == 0.01 and betas == [0.9] * 3
