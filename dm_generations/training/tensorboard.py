"""The curve of a run as event files, which TensorBoard shows."""

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

FOLDER: Final = "tensorboard"
_OWN_FILES: Final = "events.out.tfevents.*"


class EventLog:
    """An event file with the numbers of log.jsonl. It is made anew of that file whenever a run is opened."""

    def __init__(self, folder: Path, started: float, lines: Iterable[Mapping[str, Any]]):
        """Replace the event files of a folder.

        Args:
            folder: Made if it is missing.
            started: When the run was begun, in seconds since 1970.
            lines: Of log.jsonl so far.

        Raises:
            OSError: They cannot be written.
        """
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._started = started
        folder.mkdir(exist_ok=True)
        for old in folder.glob(_OWN_FILES):
            old.unlink()
        self._writer = EventsWriter(str(folder / "events"))
        # Tells a TensorBoard that has read the files before to forget their steps.
        self._writer.write_event(Event(step=0, session_log=SessionLog(status=SessionLog.START)))
        for line in lines:
            with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):  # a line of someone else
                self._write(line)
        self._writer.flush()

    def add(self, line: Mapping[str, Any]) -> None:
        """Append the numbers of a line of log.jsonl. Raises OSError if they cannot be written."""
        self._write(line)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # what could not be written is in log.jsonl
            self._writer.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in line.items()
            if name not in ("step", "seconds")
        ]
        time = self._started + line["seconds"]
        self._writer.write_event(Event(wall_time=time, step=line["step"], summary=Summary(value=values)))
