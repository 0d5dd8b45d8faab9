"""What errors say."""

from __future__ import annotations

import pytest

from visiondistill.engine.errors import some


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
