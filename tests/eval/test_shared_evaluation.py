"""Two processes measure what one does: every image once, also where the share is uneven."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from test_classify import Pairs, Table, numbered, random_answers

import visiondistill
from visiondistill.eval import accuracy_report, agreement, collect, evaluate


def findings() -> list:
    """Figures of a set in memory and of a map-style one, as this process gets them."""
    answers = random_answers(rows=37)
    data, model, other = numbered(answers), Table(answers.logits), Table(random_answers(rows=37, seed=1).logits)
    report = accuracy_report(model, data, val=Pairs(data), teacher=other, batch_size=5)
    found = [
        vars(evaluate(model, data, 4)),
        vars(evaluate(model, Pairs(data), 4)),
        agreement(model, other, data),
        vars(report.calibrated),
        vars(report.teacher),
        torch.equal(collect(model, Pairs(data), 3).logits, answers.logits),
    ]
    try:
        evaluate(Table(random_answers(rows=1).logits), numbered(random_answers(rows=1)))
    except ValueError as error:
        return [*found, str(error)]
    return [*found, "measured"]


def played(processes: int) -> list[list]:
    """What each of so many processes finds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(visiondistill.__file__).parents[1]),
    }
    running = [
        subprocess.Popen(
            [sys.executable, __file__], env=common | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(processes)
    ]
    try:
        return [json.loads(process.communicate(timeout=180)[0].splitlines()[-1]) for process in running]
    finally:
        for process in running:
            process.kill()


def test_two_processes_find_what_one_finds():
    alone, (first, second) = findings(), played(2)
    assert alone[5] is True
    assert first == second
    assert first[:6] == alone[:6]
    assert alone[6] == "measured"
    assert "fewer than the 2 processes" in first[6]


if __name__ == "__main__":
    dist.init_process_group("gloo")
    print(json.dumps(findings()))
    dist.destroy_process_group()
