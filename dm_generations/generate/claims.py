"""Several processes fill one archive: each says in the archive what it is about to draw, and draws what is left.

A claim ends in the transaction that stores its picture. It is a lease, renewed for as long as its process lives: the
claims of a process that was killed end at once for others on the same machine, and within a minute elsewhere, or two
where its clock was ahead. Claims save work and no more; what keeps a draw from being stored twice is the archive's own
index.

    with Claims(archive, model_info, sampler_version, known_model) as claims:
        for batch in claims.batches(work.draws(), capacities, cost, progress.advance):
            images = pipeline.draw(batch)  # takes its time; nothing is locked
            with archive.transaction():
                archive.add_images(images, ...)
                claims.release(batch)

Imports neither NumPy nor JAX.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

from dm_generations.archive import Archive, ArchiveError, ModelInfo
from dm_generations.generate.sweep import Draw
from dm_generations.interrupts import uninterrupted

LEASE_S = 60.0  # a claim that is not renewed ends after so long
RENEWALS = 3  # in the time of a lease
POLL_S = 1.0  # between two looks at what others have claimed, when nothing else is left
LOOK_AHEAD = 512  # draws looked at in one transaction, which keeps other writers waiting
DIGEST_BYTES = 16


class Claims:
    """What this process draws at the moment, for others that fill `archive` to see; a context manager.

    generator, sampler_version: who draws. find_model: the archive's id of a model, None if it is new there.
    init_md5: of the codes that the draws go on from, "" if they are drawn whole. Leaving gives back what is claimed.
    """

    def __init__(
        self,
        archive: Archive,
        generator: ModelInfo,
        sampler_version: int,
        find_model: Callable[[Archive, ModelInfo], int | None],
        init_md5: str = "",
        lease_s: float = LEASE_S,
    ):
        self.owner = f"{_process_space()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._archive = archive
        self._generator = generator
        self._sampler_version = sampler_version
        self._find_model = find_model
        self._init_md5 = init_md5
        self._lease_s = lease_s
        self._renewals = _Renewals(2 * lease_s)
        self._is_over = threading.Event()
        self._renewer: threading.Thread | None = None

    def __enter__(self) -> "Claims":
        connection = self._archive.duplicate()  # opened here and not in the thread, which then cannot fail to
        self._renewer = threading.Thread(target=self._renew, args=[connection], name="renew-claims", daemon=True)
        self._renewer.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with uninterrupted():
            self._is_over.set()
            self._renewer.join()
        with contextlib.suppress(ArchiveError):  # of a full disk, say: claims end by themselves too
            with self._archive.transaction():
                self._holders()
                self._archive.release_claims(self.owner)

    def batches(
        self,
        draws: Iterable[Draw],
        capacities: Sequence[int],
        cost: Callable[[Draw], int],
        on_elsewhere: Callable[[int], None] = lambda count: None,
    ) -> Iterator[list[Draw]]:
        """The draws that are neither stored nor claimed by others, in batches that are claimed for this process.

        A batch takes draws, in the order of `draws` but for those that another process had claimed. It fills the
        `capacities` one after the other, each until the next draw's cost is more than what is left of it. When all
        that is left is claimed by others this waits, until they have stored it or have ended; so at the end every draw
        is stored, or was in a batch. Release each batch in the transaction that stores it. `on_elsewhere` hears how
        many draws others have stored.
        """
        fresh = iter(draws)
        postponed: list[Draw] = []
        while True:
            earlier = iter(postponed)
            batch, postponed, stored_count = self._take(itertools.chain(earlier, fresh), capacities, cost)
            postponed += earlier
            if stored_count:
                on_elsewhere(stored_count)
            if batch:
                yield batch
            elif postponed:
                time.sleep(POLL_S)
            else:
                return

    def release(self, draws: Sequence[Draw]) -> None:
        """Gives back the claims of these draws. Inside the transaction that stores them."""
        self._archive.release_claims(self.owner, map(self.digest, draws))

    def digest(self, draw: Draw) -> bytes:
        """What stands for a draw among the claims: 16 bytes that depend on all that its picture depends on."""
        who = [self._generator.sha256, self._generator.config, self._sampler_version]
        what = [dataclasses.asdict(draw.combination), draw.key0, draw.key1, self._init_md5]
        text = json.dumps([who, what], sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(text.encode("ascii"), digest_size=DIGEST_BYTES).digest()

    def _take(
        self, draws: Iterator[Draw], capacities: Sequence[int], cost: Callable[[Draw], int]
    ) -> tuple[list[Draw], list[Draw], int]:
        """Claims a batch; returns it, the draws looked at that are left for later, how many were stored already."""
        batch: list[Draw] = []
        postponed: list[Draw] = []
        stored_count = 0
        rooms = iter(capacities)
        room = next(rooms)
        is_full = False
        while not is_full and (some := list(itertools.islice(draws, LOOK_AHEAD))):
            with self._archive.transaction():
                holders = self._holders()
                generator_id = self._find_model(self._archive, self._generator)
                claimed = []
                for index, draw in enumerate(some):
                    needed = cost(draw)
                    assert needed <= min(capacities), f"a draw costs {needed}, there is room for {capacities}"
                    if needed > room:
                        room = next(rooms, 0)
                    if needed > room:
                        postponed += some[index:]
                        is_full = True
                        break
                    digest = self.digest(draw)
                    if holders.get(digest, self.owner) != self.owner:
                        postponed.append(draw)
                    elif self._is_stored(draw, generator_id):
                        stored_count += 1
                    else:
                        batch.append(draw)
                        claimed.append(digest)
                        room -= needed
                self._archive.claim(claimed, self.owner, time.time() + self._lease_s)
        return batch, postponed, stored_count

    def _is_stored(self, draw: Draw, generator_id: int | None) -> bool:
        """Whether another process stored a draw since the work was planned."""
        return generator_id is not None and self._archive.has_draw(
            **dataclasses.asdict(draw.combination),
            key0=draw.key0,
            key1=draw.key1,
            generator_id=generator_id,
            sampler_version=self._sampler_version,
            init_md5=self._init_md5,
        )

    def _holders(self) -> dict[bytes, str]:
        """Owner by digest. Claims of processes that have ended are dropped; inside a transaction."""
        holders = self._archive.claims()
        silent = self._renewals.silent(self._archive.claim_ends(), time.monotonic())
        others = set(holders.values()) - {self.owner}
        ended = {owner for owner in others if owner in silent or _has_ended(owner)}
        for owner in ended:
            self._archive.release_claims(owner)
        return {digest: owner for digest, owner in holders.items() if owner not in ended}

    def _renew(self, archive: Archive) -> None:
        with archive:
            while not self._is_over.wait(self._lease_s / RENEWALS):
                with contextlib.suppress(ArchiveError):  # locked for long, or a full disk: there is a next time
                    with archive.transaction():
                        archive.renew_claims(self.owner, time.time() + self._lease_s)


class _Renewals:
    """Who has stopped renewing, by this machine's steady clock alone: a claim that was made by a clock which is ahead
    would outlive its process by as much.
    """

    def __init__(self, longest_s: float):
        self._longest_s = longest_s
        self._seen: dict[str, tuple[float, float]] = {}  # by owner: the end of its claims, and when that was new

    def silent(self, ends: dict[str, float], now: float) -> set[str]:
        """Owners whose claims have had the same end for `longest_s` seconds, of `ends` by owner; now: in seconds"""
        new = {owner: (end, now) for owner, end in ends.items()}
        old, self._seen = self._seen, new
        for owner in old.keys() & new.keys():
            if old[owner][0] == new[owner][0]:
                new[owner] = old[owner]
        return {owner for owner, (_, since) in new.items() if now - since > self._longest_s}


def _process_space() -> str:
    """Where process ids mean what they mean here: the machine, and on Linux its boot and the container."""
    name = socket.gethostname()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")[:8]
        return f"{name}/{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # no Linux
        return name


def _has_ended(owner: str) -> bool:
    """Whether the process of a claim is known to live no longer."""
    try:
        space, pid_text, _ = owner.rsplit(":", 2)
        pid = int(pid_text)
    except ValueError:  # another program's idea of an owner
        return False
    if space != _process_space() or os.name == "nt":  # where os.kill would end the process
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # another user's
        return False
    return _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    """Whether a process has ended and waits for its parent to hear of it; False where there is no /proc."""
    try:
        status = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False
    return status.rpartition(b")")[2].split()[0] in (b"Z", b"X")  # after "pid (name)"; names can hold anything
