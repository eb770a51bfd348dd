"""Event files have the numbers of log.jsonl, once each, however often a run was stopped."""

import errno
import json
import struct
import sys

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from dm_generations.cli import main
from dm_generations.errors import UserError
from dm_generations.training import tensorboard
from dm_generations.training.run import Run


def open_run(folder, **options):
    return Run(folder, {"params": np.zeros(3, np.float32)}, {}, 2, **options)


def train_step(state, step):
    return {"params": state["params"] + 1}, {"loss": np.float32(1 / (step + 1)), "nats": np.float32(step)}


def fail_at(stop):
    def step(state, number):
        if number == stop:
            raise KeyboardInterrupt
        return train_step(state, number)

    return step


def read_events(folder):
    """The events of the only event file of a run."""
    (path,) = (folder / tensorboard.FOLDER).iterdir()
    data, events = path.read_bytes(), []
    while data:
        (length,) = struct.unpack_from("<Q", data)  # then a checksum, the event, and its checksum
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return events


def assert_as_log(folder):
    first, second, *events = read_events(folder)
    assert first.file_version and second.session_log.status == SessionLog.START and second.step == 0
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [event.step for event in events] == [line["step"] for line in lines]
    for event, line in zip(events, lines, strict=True):
        values = {value.tag: value.simple_value for value in event.summary.value}
        assert values.keys() == line.keys() - {"step", "seconds"}
        for name, value in values.items():
            assert value == np.float32(line[name])
    times = np.diff([event.wall_time for event in events])
    np.testing.assert_allclose(times, np.diff([line["seconds"] for line in lines]), atol=1e-3)


def test_a_stopped_run_neither_repeats_nor_loses_steps(tmp_path):
    for stop, event_files in ((3, False), (5, True), (5, True)):
        with open_run(tmp_path, event_files=event_files) as run, pytest.raises(KeyboardInterrupt):
            run.train(6, fail_at(stop), log_every=1)
    assert_as_log(tmp_path)
    with open_run(tmp_path, event_files=True) as run:
        run.train(6, train_step, log_every=1)
    assert_as_log(tmp_path)
    assert len(read_events(tmp_path)) == 2 + 6


def test_lines_of_someone_else_are_left_out(tmp_path):
    with open_run(tmp_path) as run:
        run.train(2, train_step, log_every=1)
    lines = ['{"step": 1}', '{"step": 1, "seconds": 1, "loss": "x"}', '{"step": -1e300, "seconds": 1}']
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write("\n".join([*lines, '{"step": 1, "seconds": "x"}']) + "\n")
    open_run(tmp_path, event_files=True).__exit__()
    assert [event.step for event in read_events(tmp_path)[2:]] == [1, 2]


def test_links_in_the_folder_are_refused(tmp_path):
    open_run(tmp_path / "run", event_files=True).__exit__()
    other = tmp_path / "other"
    other.write_text("mine")
    (tmp_path / "run" / tensorboard.FOLDER / "events.out.tfevents.1.x").symlink_to(other)
    with pytest.raises(UserError, match="tfevents"):
        open_run(tmp_path / "run", event_files=True)
    assert other.read_text() == "mine"


def test_a_full_disk_is_one_line_and_loses_no_line_of_the_log(tmp_path, monkeypatch):
    def refuse(self, event):
        raise OSError(errno.ENOSPC, "No space left on device")

    with open_run(tmp_path, event_files=True) as run:
        monkeypatch.setattr("tensorboardX.event_file_writer.EventsWriter.write_event", refuse)
        with pytest.raises(UserError, match="No space left"):
            run.train(6, train_step, log_every=1)
    assert json.loads((tmp_path / "log.jsonl").read_text())["step"] == 1


def test_the_extra_that_is_missing_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert main(["train", "a.db", "--run", str(tmp_path / "run"), "--tensorboard"]) == 1
    assert "dm-generations[tensorboard]" in capsys.readouterr().err and not (tmp_path / "run").exists()
