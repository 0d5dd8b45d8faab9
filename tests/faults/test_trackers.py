"""A tracker that raises, hangs or is absent costs one warning: not a step, not a line, not a bit of the weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import fake_trackers as fakes
import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from fake_trackers import STEPS, path_of, run

import visiondistill
from visiondistill import recipes
from visiondistill.engine import Result, Run, report
from visiondistill.engine.errors import SettingsError
from visiondistill.engine.launch import World
from visiondistill.engine.report import Reports
from visiondistill.engine.track import Tracker

HANGING = (fakes.Hangs, fakes.HangsAtStart, fakes.HangsAtClose)
FAILING = (
    fakes.RaisesAtInit,
    fakes.RaisesAtStart,
    fakes.ExitsAtStart,
    fakes.RaisesAtSettings,
    fakes.RaisesAtStep5,
    fakes.RaisesAlways,
    fakes.RaisesAtClose,
    *HANGING,
)
ALL = list(range(1, STEPS + 1))


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No trackers of earlier tests, time enough on a busy machine, and no thread that hangs on after the test."""
    monkeypatch.setattr(report, "PATIENCE", 60.0)
    fakes.Hangs.released.clear()
    for kind in (fakes.Keeps, *fakes.Keeps.__subclasses__()):
        kind.made.clear()
    yield
    fakes.Hangs.released.set()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "PATIENCE", 0.3)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(tmp_path_factory.mktemp("plain"))


def warned(folder: Path, *trackers: type, **settings: object) -> tuple[Result, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run(folder, *map(path_of, trackers), **settings)
    return result, [str(warning.message) for warning in caught if "tracker" in str(warning.message)]


def steps_of(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_weights(one: Result, other: Result) -> None:
    left, right = one.product.state_dict(), other.product.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("kind", FAILING, ids=lambda kind: kind.__name__)
def test_a_failing_tracker_costs_one_warning(
    kind: type, plain: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind in HANGING:
        monkeypatch.setattr(report, "PATIENCE", 1.0)
    began = time.monotonic()
    result, found = warned(tmp_path, kind, fakes.Keeps)
    assert time.monotonic() - began < 30
    assert len(found) == 1, found
    assert path_of(kind) in found[0]
    assert steps_of(tmp_path) == ALL
    assert list(fakes.Keeps.made[0].lines) == ALL
    assert fakes.Keeps.made[0].events == ["start", "finish"]
    assert result.reason == "finished"
    assert_same_weights(result, plain)


@pytest.mark.usefixtures("impatient")
def test_the_warning_says_what_failed_and_when(tmp_path: Path) -> None:
    for kind, words in (
        (fakes.RaisesAtStart, "failed while it started (ConnectionError: no such host)"),
        (fakes.ExitsAtStart, "failed while it started (SystemExit: please log in)"),
        (fakes.RaisesAtSettings, "failed over the settings (TypeError: what is this?)"),
        (fakes.RaisesAtStep5, "failed at step 5 (ConnectionError: server restarts)"),
        (fakes.RaisesAtClose, "failed while it closed (ConnectionError: cannot say goodbye)"),
        (fakes.Hangs, f"had not finished 0.3 s after the end: {STEPS - 4} of {STEPS} lines not delivered"),
        (fakes.HangsAtStart, f"{STEPS} of {STEPS} lines not delivered"),
        (fakes.HangsAtClose, f"0 of {STEPS} lines not delivered"),
    ):
        folder = tmp_path / kind.__name__
        (text,) = warned(folder, kind)[1]
        assert words in text
        assert str(folder / "metrics.jsonl") in text


def test_a_tracker_that_recovers_gets_the_other_lines(tmp_path: Path) -> None:
    warned(tmp_path, fakes.RaisesAtStep5)
    (tracker,) = fakes.RaisesAtStep5.made
    assert list(tracker.lines) == [step for step in ALL if step != 5]
    assert tracker.events == ["start", "finish"]


@pytest.mark.usefixtures("impatient")
def test_a_full_queue_drops_lines_with_the_same_single_warning(
    plain: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "BACKLOG", 3)
    result, found = warned(tmp_path, fakes.HangsAtStart)
    assert len(found) == 1
    assert "3 lines behind" in found[0]
    assert steps_of(tmp_path) == ALL
    assert_same_weights(result, plain)
    fakes.Hangs.released.set()
    (tracker,) = fakes.HangsAtStart.made
    deadline = time.monotonic() + 30
    while not tracker.events and time.monotonic() < deadline:
        time.sleep(0.01)
    assert list(tracker.lines) == [1, 2, 3]


@pytest.mark.usefixtures("impatient")
def test_a_hanging_tracker_delays_no_step(tmp_path: Path) -> None:
    began: list[float] = []
    warned(tmp_path, fakes.Hangs, at=lambda step: began.append(time.monotonic()))
    assert began[-1] - began[0] < 3


def test_a_tracker_gets_the_numbers_of_each_line_and_the_settings(tmp_path: Path) -> None:
    config = "student: {class_path: my.Net, init_args: {widths: [4, 8], name: null}}\nsteps: 12\n"
    result = run(tmp_path / "mine", path_of(fakes.Spoils), path_of(fakes.Keeps), config=config)
    (tracker,) = fakes.Keeps.made
    for line in result.history:
        numbers = {name: value for name, value in line.items() if name not in ("step", "stage")}
        assert tracker.lines[line["step"]] == numbers
        assert {"student/fit", "lr/student", "images_per_second", "data_wait"} <= set(numbers)
    assert tracker.run_name == "mine"
    assert tracker.settings["student.class_path"] == "my.Net"
    assert tracker.settings["student.init_args.widths"] == "[4, 8]"
    assert tracker.settings["student.init_args.name"] is None
    assert tracker.settings["steps"] == 12
    assert tracker.settings["run.batch_size"] == 8


def test_trackers_get_numbers_only(tmp_path: Path) -> None:
    reports = Reports(Run(str(tmp_path), batch_size=8, report_to=[path_of(fakes.Keeps)]))
    reports.start()
    reports.log(1, {"fit": 0.5, "count": 2, "stage": "main", "flag": True, "none": None, "list": [1]})
    reports.close()
    assert fakes.Keeps.made[0].lines == {1: {"fit": 0.5, "count": 2}}


def test_of_several_failures_the_first_is_told(tmp_path: Path) -> None:
    reports = Reports(Run(str(tmp_path), batch_size=8, report_to=[path_of(fakes.RaisesAlways)]))
    reports.start()
    reports.log(1, {"fit": 0.5})
    with pytest.warns(UserWarning, match=r"failed at step 1 \(ConnectionError: gone\)") as caught:
        reports.close()
    assert len(caught) == 1


def test_a_tracker_that_needs_a_folder_gets_one_in_the_run_folder(tmp_path: Path) -> None:
    run(tmp_path, path_of(fakes.InFolder))
    assert fakes.InFolder.made[0].logging_dir == str(tmp_path / "keeps")


def test_only_the_first_process_reports(tmp_path: Path) -> None:
    reports = Reports(Run(str(tmp_path), batch_size=8, report_to=[path_of(fakes.Keeps)]))
    cpu = torch.device("cpu")
    with Tracker(tmp_path, World(cpu, rank=1, size=2), 1, 0, 8, False, reports) as tracker:
        tracker.log(1, "main", {"fit": 1.0})
    assert not fakes.Keeps.made
    assert not list(tmp_path.iterdir())
    reports = Reports(Run(str(tmp_path), batch_size=8, report_to=[path_of(fakes.Keeps)]))
    with Tracker(tmp_path, World(cpu, rank=0, size=2), 1, 0, 8, False, reports) as tracker:
        tracker.log(1, "main", {"fit": 1.0})
    assert fakes.Keeps.made[0].lines[1]["fit"] == 1.0


@pytest.mark.usefixtures("impatient")
def test_a_signal_ends_a_run_whose_tracker_hangs_and_it_resumes_with_another(plain: Result, tmp_path: Path) -> None:
    def kill(step: int) -> None:
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    cut, found = warned(tmp_path, fakes.Hangs, at=kill)
    assert (cut.reason, cut.step) == ("SIGTERM", 7)
    assert len(found) == 1
    resumed = run(tmp_path, path_of(fakes.Keeps), resume="auto")
    assert_same_weights(resumed, plain)
    assert list(fakes.Keeps.made[0].lines) == list(range(8, STEPS + 1))
    assert steps_of(tmp_path) == ALL


SCRIPT = """
import multiprocessing, sys, time
from pathlib import Path
import fake_trackers as fakes
from visiondistill.engine import report

report.PATIENCE = 0.5

def fork(step):
    if step == 8:
        child = multiprocessing.get_context("fork").Process(target=print, args=("child",))
        child.start()
        child.join(20)
        assert child.exitcode == 0, child.exitcode

result = fakes.run(Path(sys.argv[1]), fakes.path_of(fakes.Hangs), at=fork)
print(result.reason, time.time(), flush=True)
"""


def test_the_interpreter_exits_although_a_tracker_hangs_for_ever(tmp_path: Path) -> None:
    """Forked children too."""
    places = [str(Path(fakes.__file__).parent), str(Path(visiondistill.__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    ended = time.time()
    assert done.returncode == 0, done.stderr
    assert "child" in done.stdout
    reason, stamp = done.stdout.split()[-2:]
    assert reason == "finished"
    assert ended - float(stamp) < 20
    assert done.stderr.count("had not finished 0.5 s") == 1
    assert steps_of(tmp_path) == ALL


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tensorbord", ["no tracker 'tensorbord'", *LOGGER_TYPE_TO_CLASS, "package.module.Class"]),
        ("no_such_package.Mine", ["cannot be imported", "no_such_package"]),
        ("fake_trackers.Mine", ["cannot be imported", "Mine"]),
        ("fake_trackers.Sums", ["not a subclass of accelerate.tracking.GeneralTracker"]),
        ("clearml", ["pip install clearml"]),
    ],
)
def test_wrong_names_are_refused_before_anything_is_there(
    name: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate.utils.is_clearml_available", lambda: False)
    with pytest.raises(SettingsError, match=r"run\.report_to") as caught:
        run(tmp_path / "run", name)
    assert caught.value.exit_code == 2
    assert all(word in str(caught.value) for word in [name, *words]), caught.value
    with pytest.raises(recipes.RecipeError, match=r"run\.report_to"):
        recipes.check(recipes.override(recipes.load("smoke/kd"), {"run.report_to": [name]}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", ["tensorboard", [3], None])
def test_something_else_than_a_list_of_names_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"report_to=.* a list of names"):
        Run("nowhere", batch_size=8, report_to=value)


def test_a_recipe_names_trackers() -> None:
    recipes.check(recipes.override(recipes.load("smoke/kd"), {"run.report_to": [path_of(fakes.Keeps)]}))


@pytest.fixture
def tensorboard() -> str:
    """The name, where it is installed."""
    pytest.importorskip("tensorboard")
    return "tensorboard"


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard" / folder.name), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def from_history(result: Result) -> dict[str, list[tuple[int, float]]]:
    names = [name for name in result.history[0] if name not in ("step", "stage")]
    return {name: [(line["step"], pytest.approx(line[name])) for line in result.history] for name in names}


def test_tensorboard_holds_the_lines_of_the_run(plain: Result, tensorboard: str, tmp_path: Path) -> None:
    result = run(tmp_path / "mine", tensorboard)
    assert scalars(tmp_path / "mine") == from_history(result)
    (settings,) = (tmp_path / "mine" / "tensorboard").rglob("hparams.yml")
    assert "run.batch_size: 8" in settings.read_text()
    assert_same_weights(result, plain)


def test_tensorboard_continues_the_curve_of_a_resumed_run(plain: Result, tensorboard: str, tmp_path: Path) -> None:
    """The killed run was beyond its checkpoint: what it logged there is not shown twice."""

    def fail(step: int) -> None:
        if step == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "mine", tensorboard, at=fail, checkpoint_every=6)
    assert [step for step, _ in scalars(tmp_path / "mine")["student/fit"]] == list(range(1, 10))
    time.sleep(1.1)  # event files are ordered by the second in their names
    resumed = run(tmp_path / "mine", tensorboard, resume="auto")
    assert scalars(tmp_path / "mine") == from_history(resumed)
    assert_same_weights(resumed, plain)


def test_tensorboard_goes_on_beside_one_that_fails(tensorboard: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"RaisesAlways.*failed at step 1"):
        result = run(tmp_path / "mine", path_of(fakes.RaisesAlways), tensorboard)
    assert scalars(tmp_path / "mine") == from_history(result)
