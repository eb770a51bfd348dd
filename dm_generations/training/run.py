"""`Run`: a training run in a folder, which goes on to the same weights after it was killed.

    config.json                       what the run was begun with
    log.jsonl                         the curve, a line of JSON at a time
    tensorboard/                      the same for TensorBoard, if asked for
    checkpoints/00000500/             the state after 500 steps; the newest few are kept
        state.safetensors, step.json  all that the next step needs besides the parameters
        model.safetensors, ...        the parameters: a folder that --model takes

A checkpoint appears whole or not at all. Batches depend on the seed and the number of the step alone, so a run that was
stopped and resumed has those of one that was not.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from dm_generations.atomic_io import open_locked, write_atomic
from dm_generations.errors import UserError, one_line, short_repr
from dm_generations.training import hosts, tensorboard
from dm_generations.weights import native

CONFIG_FILE, LOG_FILE, STATE_FILE, STEP_FILE = "config.json", "log.jsonl", "state.safetensors", "step.json"
CHECKPOINTS, PARAMS = "checkpoints", "params"
_STEP_FOLDER = re.compile(r"\d{8,18}")
_MAX_LINE = 1 << 20  # bytes of the log; longer ones are of someone else

logger = logging.getLogger(__name__)

State = dict[str, Any]  # of arrays; "params" are those of the model
Metrics = Mapping[str, Any]  # numbers, or arrays of one number that are still being computed
TrainStep = Callable[[State, int], tuple[State, Metrics]]
WriteModel = Callable[[Path, State, int], None]  # folder, state on the host, and its step


class Run:
    """A training run in a folder. A context manager: no other run trains there meanwhile.

    Of several processes that train together, see `hosts`, all have a `Run`, and the first one writes.

    Attributes:
        folder: Of the run.
        state: The trainer's state, on the devices.
        step: Steps done.
        seconds: Time of the steps done, evaluation included.
    """

    def __init__(
        self,
        folder: Path,
        state: State,
        settings: Mapping[str, Any],
        save_every: int,
        *,
        keep: int = 1,
        put: Callable[[State], State] = jax.device_put,
        write_model: WriteModel | None = None,
        event_files: bool = False,
    ):
        """Open a run, and resume it if the folder has a checkpoint.

        Args:
            folder: Made if it is missing.
            state: To start from.
            settings: JSON data; a run is resumed only with the same.
            save_every: Steps between checkpoints.
            keep: How many checkpoints are kept.
            put: Puts a state on the devices.
            write_model: Writes the parameters as a folder of our own. Without it they are a part of the state's file.
            event_files: Whether the curve is written for TensorBoard too.

        Raises:
            UserError: The run was begun with other settings, another process trains there, or it cannot be written.
        """
        self.folder, self._settings, self._save_every, self._keep = folder, dict(settings), save_every, keep
        self._put, self._write_model = put, write_model
        self.step, self.seconds = 0, 0.0
        self._metrics: tuple[int, Metrics] = (0, {})
        self._events: tensorboard.EventLog | None = None
        with contextlib.ExitStack() as stack:
            with hosts.together():
                if hosts.is_first():
                    stack.enter_context(self._lock_folder())
                    self._check_settings()
            self.state = self._find_state(state)
            with hosts.together():
                if hosts.is_first():
                    lines = self._cut_log()
                    if event_files:
                        with _writing(folder / tensorboard.FOLDER):
                            started = (folder / CONFIG_FILE).stat().st_mtime
                            self._events = tensorboard.EventLog(folder / tensorboard.FOLDER, started, lines)
            self._stack = stack.pop_all()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error: object) -> None:
        if self._events:
            self._events.close()
        self._stack.close()

    def find_checkpoint(self) -> Path | None:
        """Return the folder of the newest checkpoint; None before the first one."""
        return max(self._checkpoints(), default=None, key=lambda path: int(path.name))

    def save(self) -> Path:
        """Write a checkpoint and remove the oldest ones; returns its folder.

        Raises:
            UserError: It cannot be written, on a full disk for instance, or a weight is NaN or infinite. The
                checkpoints before it stay.
        """
        path = self._path_of(self.step)
        state = hosts.fetch(self.state)
        self._check_finite({name: value for name, value in _flatten(state).items() if not name.startswith("opt/")})
        with hosts.together():
            if hosts.is_first():
                self._write(path, state)
        return path

    def _write(self, path: Path, state: State) -> None:
        unfinished = path.with_name(f".{path.name}.unfinished")
        with _writing(path):
            shutil.rmtree(unfinished, ignore_errors=True)
            try:
                unfinished.mkdir()
                apart = {} if self._write_model is None else {PARAMS}
                if self._write_model is not None:
                    self._write_model(unfinished, state, self.step)
                kept = {name: value for name, value in state.items() if name not in apart}
                save_file(_flatten(kept), unfinished / STATE_FILE)
                about = {"step": self.step, "seconds": self.seconds}
                (unfinished / STEP_FILE).write_text(json.dumps(about))
                shutil.rmtree(path, ignore_errors=True)
                os.rename(unfinished, path)
            except Exception as error:
                shutil.rmtree(unfinished, ignore_errors=True)
                if isinstance(error, OSError | UserError):
                    raise
                raise UserError(f"cannot write {path}: {one_line(error)}") from error  # of safetensors
        for old in sorted(self._checkpoints(), key=lambda path: int(path.name))[: -self._keep]:
            shutil.rmtree(old, ignore_errors=True)

    def log(self, metrics: Metrics) -> None:
        """Append a line to the curve, and log it."""
        line = {"step": self.step, "seconds": round(self.seconds, 3)}
        line |= {key: float(f"{float(value):.6g}") for key, value in metrics.items()}
        with hosts.together():
            if hosts.is_first():
                with _writing(self.folder), open(self.folder / LOG_FILE, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            if self._events:
                with _writing(self.folder / tensorboard.FOLDER):
                    self._events.add(line)
        logger.info("%s", "  ".join(f"{key} {value:g}" for key, value in line.items()))

    def train(
        self,
        steps: int,
        train_step: TrainStep,
        log_every: int,
        evaluate: Callable[[State], Metrics] | None = None,
        evaluate_every: int = 0,
        on_step: Mapping[int, Callable[[State, int], None]] | None = None,
    ) -> None:
        """Call `state, metrics = train_step(state, step)` until `steps` are done, saving and logging on the way.

        Args:
            steps: Steps of the whole run.
            train_step: Its metrics are looked at while the next step is computed.
            log_every: Steps between lines of the curve.
            evaluate: More metrics for the curve, of a state.
            evaluate_every: Steps between evaluations; 0 is at the end alone.
            on_step: Called with the state and the step, after every so many steps.

        Raises:
            UserError: A metric or a weight is NaN or infinite; no checkpoint has been written of that state. Or a
                checkpoint cannot be written.
        """
        started = time.perf_counter() - self.seconds
        while self.step < steps:
            self.state, metrics = train_step(self.state, self.step)
            self._check_metrics()
            self.step += 1
            self._metrics = self.step, metrics
            is_last = self.step == steps
            is_logged = is_last or self.step % log_every == 0
            is_saved = is_last or self.step % self._save_every == 0
            due = [call for every, call in (on_step or {}).items() if self.step % every == 0]
            if is_logged or is_saved or due:
                found = self._check_metrics()
                self.seconds = time.perf_counter() - started
            if is_logged:
                if evaluate and (is_last or (evaluate_every and self.step % evaluate_every == 0)):
                    found = {**found, **evaluate(self.state)}
                    self._check_finite(found)
                self.log(found)
            for call in due:
                call(self.state, self.step)
            if is_saved:
                self.seconds = time.perf_counter() - started
                self.save()

    def _check_metrics(self) -> Metrics:
        """Wait for the metrics of the last step. Raises UserError for one that is no finite number."""
        step, metrics = self._metrics
        metrics = jax.device_get(metrics)
        self._check_finite(metrics, step)
        return metrics

    def _check_finite(self, arrays: Mapping[str, Any], step: int | None = None) -> None:
        """Raise UserError for a floating-point array with NaN or infinity; `step` is that of the run by default."""
        for name, array in arrays.items():
            if jnp.issubdtype(jnp.result_type(array), jnp.floating) and not np.isfinite(array).all():
                what = "nan" if np.isnan(array).any() else "infinite"
                last = self.find_checkpoint()
                good = "there is no checkpoint yet" if last is None else f"the last good checkpoint is {last}"
                raise UserError(
                    f"{name} is {what} at step {self.step if step is None else step} of {self.folder}; {good}. Train "
                    "from there with a lower --learning-rate, in another --run"
                )

    @contextlib.contextmanager
    def _lock_folder(self) -> Iterator[None]:
        """Make the folder, and keep other runs out of it."""
        with _writing(self.folder):
            (self.folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            _check_entries(self.folder)
            try:
                lock = open_locked(self.folder / ".lock")
            except BlockingIOError as error:
                message = f"{self.folder}: another process trains here; wait for it, or use another --run"
                raise UserError(message) from error
        with lock:
            yield

    def _find_state(self, state: State) -> State:
        """Return the state of the newest checkpoint that the first process sees, or the one given."""
        with hosts.together():
            stored = self.find_checkpoint() if hosts.is_first() else None
        step = hosts.share_number(-1 if stored is None else int(stored.name))
        with hosts.together():
            return self._put(state if step < 0 else self._read(self._path_of(step), state))

    def _path_of(self, step: int) -> Path:
        return self.folder / CHECKPOINTS / f"{step:08d}"

    def _checkpoints(self) -> list[Path]:
        folder = self.folder / CHECKPOINTS
        if not folder.is_dir():  # of another process that trains with this one, on a disk of its own
            return []
        return [path for path in folder.iterdir() if _STEP_FOLDER.fullmatch(path.name) and path.is_dir()]

    def _check_settings(self) -> None:
        """Write the settings of a new run; compare them with those of one that is resumed."""
        path = self.folder / CONFIG_FILE
        if not path.exists():
            with _writing(path):
                write_atomic(path, (json.dumps(self._settings, indent=2) + "\n").encode())
            return
        stored, settings = native.read_json_object(path), json.loads(json.dumps(self._settings))
        for name in [*settings, *(stored.keys() - settings.keys())]:
            if stored.get(name) != settings.get(name):
                raise UserError(
                    f"{self.folder} was begun with {name} {short_repr(stored.get(name))}, not "
                    f"{short_repr(settings.get(name))}: use the same, or another --run"
                )

    def _read(self, folder: Path, like: State) -> State:
        """Read the state of a checkpoint; `like` has its structure."""
        about = native.read_json_object(folder / STEP_FILE)
        flat = native.read_safetensors(folder / STATE_FILE)
        expected = {name: value for name, value in like.items() if self._write_model is None or name != PARAMS}
        names = _flatten(expected)
        if _layout(flat) != _layout(names):
            raise UserError(f"{folder} is of another model or optimiser; use another --run")
        leaves = [np.array(flat[name]) for name in names]  # copies: devices write where they lie
        state = jax.tree.unflatten(jax.tree.structure(expected), leaves)
        if PARAMS in like and PARAMS not in expected:
            state[PARAMS] = jax.tree.map(np.array, native.read_params(folder))
        try:
            self.step, self.seconds = int(about["step"]), float(about["seconds"])
            if self.step != int(folder.name):
                raise ValueError
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{folder / STEP_FILE} is damaged; remove {folder} to go on from the one before") from error
        logger.info("resuming %s at step %s", self.folder, f"{self.step:,}")
        return state

    def _cut_log(self) -> list[dict[str, Any]]:
        """Remove lines of steps that will be done again, and a line that was not finished; returns the others."""
        path = self.folder / LOG_FILE
        if not path.exists():
            return []
        kept, lines = [], []
        with _writing(path):
            with open(path, "rb") as file:
                for line in iter(lambda: file.readline(_MAX_LINE), b""):
                    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                        if (values := json.loads(line))["step"] <= self.step:
                            kept.append(line)
                            lines.append(values)
            write_atomic(path, b"".join(kept))
        return lines


def _check_entries(folder: Path) -> None:
    """Refuse a folder in which others may have put links, through which files elsewhere would change, or pipes."""
    for path in (*folder.iterdir(), *(folder / CHECKPOINTS).rglob("*"), *(folder / tensorboard.FOLDER).rglob("*")):
        mode = path.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise UserError(f"{path} is a link or no file, which a run has none of; remove it, or use another --run")


def _layout(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    return {name: (array.shape, array.dtype) for name, array in arrays.items()}


def _flatten(tree: Any) -> dict[str, np.ndarray]:
    """Arrays of a tree by their path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or one_line(error)}") from error
