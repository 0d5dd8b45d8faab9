"""What errors say."""

from __future__ import annotations

import pytest

from visiondistill.engine.errors import some
from visiondistill.engine.replay import places


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ("", "none"),
        ("ab", "'a', 'b'"),
        ("0123456789", "'0', '1', '2', '3', '4', '5', '6', '7', '8', '9'"),
        ("0123456789AB", "'0', '1', '2', '3', '4', '5', '6', '7', '8', '9' and 2 more"),
    ],
)
def test_of_many_names_the_first_ones_are_told(names: str, told: str) -> None:
    assert some(name for name in names) == told


def test_of_what_is_not_finite_a_few_tensors_of_each_player_are_told() -> None:
    weights, biases = ([f"players.{player}.{n}" for n in range(9)] for player in ("student", "critic"))
    gradients = [f"student: {name}" for name in weights]
    found = ["train.image", *weights, "parts.kd.means", "student/ce", *gradients, *biases[:3], "student/kd"]
    assert places(found) == [
        "'train.image', 'parts.kd.means'",
        "'players.student.0', 'players.student.1', 'players.student.2' and 6 more",
        "'student/ce', 'student/kd'",
        "'student: players.student.0', 'student: players.student.1', 'student: players.student.2' and 6 more",
        "'players.critic.0', 'players.critic.1', 'players.critic.2'",
    ]
