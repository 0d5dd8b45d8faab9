"""Everything that two processes must do as one does. One pair of processes plays it all: see `harness.spawn`."""

from __future__ import annotations

import pytest
from harness import (
    POISONED_TERM,
    Job,
    Outcome,
    apart,
    assert_continues,
    assert_same,
    continued,
    curves_apart,
    play,
    poisoned,
    spawn,
    uninterrupted,
)
from miniatures import MINIATURES, SPLITTABLE

TOLERANCE = 1e-10
STOP = POISON = 7
COLLECTIVE = ["bilevel", "matching", "bank", "relational"]
"""Wrong under several processes without their collectives."""
COMPILED = ["matching", "relational"]
POISONED = ["hint", "dmd2", "batch_norm", "relational", "offset"]

Outcomes = dict[str, list[Outcome]]


def halved(name: str) -> Job:
    return Job(f"{name}-halved", name, settings={"grad_accum_steps": 2})


def local(name: str) -> Job:
    return Job(f"{name}-local", name, local=True)


def compiled(name: str) -> Job:
    return Job(f"{name}-compiled", name, settings={"compile": True, "compile_backend": "eager"})


def good(name: str) -> Job:
    return Job(f"{name}-good", name, steps=POISON)


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    folder = tmp_path_factory.mktemp("two")
    jobs = [
        *(job for name in MINIATURES for job in (uninterrupted(name, STOP), continued(name, STOP, folder))),
        *map(halved, SPLITTABLE),
        *map(local, COLLECTIVE),
        *map(compiled, COMPILED),
        *map(good, POISONED),
        *(poisoned(name, POISON) for name in POISONED),
        Job("masks", "masks", steps=3, settings={"grad_accum_steps": 2}),
        Job("cut", "stages", signal_at=8),
        Job("cut-continued", "stages", weights=7, settings={"resume": str(folder / "cut")}),
        Job("cut-late", "stages", signal_in_save=6),
    ]
    return spawn(jobs, folder)


@pytest.fixture(scope="module", params=SPLITTABLE)
def alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Outcome]:
    return request.param, play(Job("alone", request.param), tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("job", ["whole", "halved"])
def test_two_processes_train_as_one_does(job: str, alone: tuple[str, Outcome], by_two: Outcomes) -> None:
    name, expected = alone
    found = by_two[f"{name}-{job}"][0]
    assert not found.error
    assert apart(found.weights, expected.weights) < TOLERANCE
    assert apart(found.ema, expected.ema) < TOLERANCE
    assert curves_apart(found, expected) < TOLERANCE


@pytest.mark.parametrize("job", ["whole", "continued"])
@pytest.mark.parametrize("name", MINIATURES)
def test_processes_agree_bit_for_bit(name: str, job: str, by_two: Outcomes) -> None:
    """BatchNorm's statistics included: another stage's teacher may be made of them."""
    first, second = by_two[f"{name}-{job}"]
    assert_same(first.weights, second.weights)
    assert_same(first.ema, second.ema)
    assert first.curve == second.curve


@pytest.mark.parametrize("name", COLLECTIVE)
def test_equality_would_miss_no_forgotten_collective(name: str, by_two: Outcomes) -> None:
    right, wrong = by_two[f"{name}-whole"][0], by_two[local(name).name][0]
    assert apart(right.weights, wrong.weights) > 1e-4


@pytest.mark.parametrize("name", MINIATURES)
def test_resume_in_mid_cycle(name: str, by_two: Outcomes) -> None:
    for whole, again in zip(by_two[f"{name}-whole"], by_two[f"{name}-continued"], strict=True):
        assert_continues(whole, again, STOP)


def test_a_signal_to_one_process_ends_both_at_one_step(by_two: Outcomes) -> None:
    assert [outcome.reason for outcome in by_two["cut"]] == ["SIGTERM", "SIGTERM"]
    for cut, whole, again in zip(by_two["cut"], by_two["stages-whole"], by_two["cut-continued"], strict=True):
        assert max(step for step, _ in cut.curve) == 9
        assert_continues(whole, again, 9)


def test_a_signal_between_two_stages_ends_both_at_one_step(by_two: Outcomes) -> None:
    """It comes to the process that writes the first stage's end; the other may be in the next stage already."""
    assert [outcome.reason for outcome in by_two["cut-late"]] == ["SIGTERM", "SIGTERM"]
    assert {max(step for step, _ in outcome.curve) for outcome in by_two["cut-late"]} == {7}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_turns_train_alike(name: str, by_two: Outcomes) -> None:
    for eager, found in zip(by_two[f"{name}-whole"], by_two[compiled(name).name], strict=True):
        assert not found.error
        assert apart(found.weights, eager.weights) < TOLERANCE
        assert curves_apart(found, eager) < TOLERANCE


@pytest.mark.parametrize("name", POISONED)
def test_both_stop_where_one_is_poisoned(name: str, by_two: Outcomes) -> None:
    """The row is the second process's; a user reads the first one's message."""
    for before, after in zip(by_two[good(name).name], by_two[poisoned(name, POISON).name], strict=True):
        assert_same(after.weights, before.weights)
        assert after.error.startswith("NonFinite: ")
        for part in (f"step {POISON} ", *POISONED_TERM[name]):
            assert part in after.error


def test_dropout_differs_between_processes_and_micro_batches(by_two: Outcomes) -> None:
    kept = by_two["masks"][0].weights["0.kept"]
    assert set(kept.flatten().tolist()) == {0.0, 2.0}
    assert len({tuple(part.flatten().tolist()) for part in kept.chunk(4)}) == 4
