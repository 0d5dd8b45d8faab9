"""The demo shows what it says, and continues when started again."""

from __future__ import annotations

import json

from visiondistill.demo import ARMS, BASELINE, DISTILLED, run_demo


def test_the_demo_distils(tmp_path, capsys):
    teacher, *students = run_demo(tmp_path / "demo", seeds=range(1))
    printed = capsys.readouterr().out
    assert len(students) == len(ARMS)
    assert teacher.parameters > 5 * students[0].parameters
    assert teacher.accuracy[0] > 0.97
    assert students[BASELINE].accuracy[0] + 0.05 < students[DISTILLED].accuracy[0] < teacher.accuracy[0]
    assert all(row.images_per_second > 0 for row in (teacher, *students))
    for row in (teacher, *students):
        assert row.spread in printed
        assert row.images in printed
    assert (tmp_path / "demo" / "demo.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert [row["accuracy"] for row in saved] == [row.accuracy for row in (teacher, *students)]

    weights = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("*.safetensors")}
    assert [row.accuracy for row in run_demo(tmp_path / "demo", seeds=range(1))] == [row["accuracy"] for row in saved]
    assert weights == {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("*.safetensors")}
