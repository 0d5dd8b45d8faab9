"""What the preflight says of weights."""

from __future__ import annotations

import dataclasses

import pytest

from visiondistill.models import WeightsSource
from visiondistill.preflight import NetworkFacts, Preflight

DIGEST = "0123456789ab" + "c" * 52


def line(source: WeightsSource) -> str:
    facts = NetworkFacts("resnet8", 100, None, (3, 8, 8), 10, str(source), source.sha256)
    given = dict.fromkeys(field.name for field in dataclasses.fields(Preflight))
    given |= {
        "student": facts,
        "steps": {"main": 1},
        "batch": "8",
        "memory": 1,
        "checkpoint": 1,
        "disk": 1,
        "notes": (),
    }
    told = Preflight(**given).lines()
    assert Preflight(**given).as_dict()["student"]["sha256"] == source.sha256
    return next(line for line in told if line.startswith("student: "))


def test_a_files_sha256_is_said_once_and_short() -> None:
    told = line(WeightsSource("file", "weights.pth", DIGEST, ("stripped the prefix 'module.'",)))
    assert told.endswith("weights file; weights.pth; sha256 0123456789ab; stripped the prefix 'module.'")
    assert told.count("sha256") == 1


def test_weights_without_a_file_have_none() -> None:
    assert line(WeightsSource()).endswith("weights random")


@pytest.mark.parametrize(("accuracy", "told"), [(0.5, "resnet8, 50.0% on validation"), (None, "resnet8")])
def test_the_teacher_in_the_model_card_may_be_unmeasured(accuracy: float | None, told: str) -> None:
    facts = NetworkFacts("resnet8", 100, None, (3, 8, 8), 10, "random", None)
    given = dict.fromkeys(field.name for field in dataclasses.fields(Preflight))
    assert Preflight(**given | {"teacher": facts, "teacher_accuracy": accuracy}).taught_by() == told
    assert Preflight(**given).taught_by() == ""
