"""Several processes fill one archive: nothing is drawn twice, nothing is left out, nobody waits for a killed one."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from archive_kit import execute
from helpers import ROOT

from dm_generations.archive import Archive, ModelInfo, NewImage, verify
from dm_generations.generate import claims as claims_module
from dm_generations.generate.claims import Claims
from dm_generations.generate.sweep import Combination, Draw, Sweep, plan

MODEL = ModelInfo("generator", "model", "0" * 64, {"layers": 1})


def find(archive: Archive, model: ModelInfo) -> int | None:
    return next((row_id for row_id, stored in archive.models().items() if stored == model), None)


def store(archive: Archive, draws: list[Draw]) -> None:
    images = [
        NewImage(
            **vars(draw.combination), key0=draw.key0, key1=draw.key1, quantvec=b"\0\0", time_start=0.0, time_end=1.0
        )
        for draw in draws
    ]
    archive.add_images(images, archive.model_id(MODEL), None, None, 1)


def sweep_draws(count: int, **axes) -> list[Draw]:
    return list(plan(Sweep(**{"prompts": ["a", "b"]} | axes, count=count), None, None, 1).draws())


def one(draw: Draw) -> int:
    return 1


def finish(archive: Archive, claims: Claims, batch: list[Draw]) -> None:
    with archive.transaction():
        store(archive, batch)
        claims.release(batch)


@pytest.fixture
def archive(tmp_path):
    with Archive.create(tmp_path / "a.db") as archive:
        yield archive


@pytest.fixture
def other(archive):
    """The same file, as another process has it open."""
    with archive.duplicate() as other:
        yield other


@pytest.fixture
def short_poll(monkeypatch):
    monkeypatch.setattr(claims_module, "POLL_S", 0.02)


def test_batches_are_the_draws_in_order(archive):
    draws = sweep_draws(5)
    with Claims(archive, MODEL, 1, find) as claims:
        found = []
        for batch in claims.batches(draws, [4], one):
            assert set(archive.claims().values()) == {claims.owner} and len(archive.claims()) == len(batch)
            found.append(batch)
            finish(archive, claims, batch)
            assert archive.claims() == {}
    assert found == [draws[:4], draws[4:8], draws[8:]]
    assert archive.count() == 10


def test_a_batch_holds_what_fits_its_capacity(archive):
    draws = sweep_draws(1, prompts=["a"], cond_scale=[3, 1, 1.5, 2, 4], top_k=[1, 2])
    cost = lambda draw: 1 if draw.combination.cond_scale == 1 else 2
    with Claims(archive, MODEL, 1, find) as claims:
        batches = list(claims.batches(draws, [4], cost))
    assert [draw for batch in batches for draw in batch] == draws
    assert [[cost(draw) for draw in batch] for batch in batches] == [[2, 1], [2, 2], [2, 2], [1, 2], [2, 2]]
    with Claims(archive, MODEL, 1, find) as claims:
        batches = list(claims.batches(draws, [4, 4], cost))
    assert [[cost(draw) for draw in batch] for batch in batches] == [[2, 1, 2, 2], [2, 2, 1, 2], [2, 2]]


def test_more_draws_than_are_looked_at_in_one_go(archive, monkeypatch):
    monkeypatch.setattr(claims_module, "LOOK_AHEAD", 7)
    draws = sweep_draws(50)
    with archive.transaction():
        store(archive, draws[:30])
    elsewhere = []
    with Claims(archive, MODEL, 1, find) as claims:
        batches = list(claims.batches(draws, [16], one, elsewhere.append))
    assert batches == [draws[30:46], draws[46:62], draws[62:78], draws[78:94], draws[94:]]
    assert elsewhere == [30]


def test_what_others_hold_comes_last_and_what_they_stored_not_at_all(archive, other, short_poll):
    draws = sweep_draws(6)
    elsewhere = []
    with Claims(archive, MODEL, 1, find) as claims, Claims(other, MODEL, 1, find) as others:
        held = next(others.batches(draws, [4], one))
        batches = claims.batches(draws, [6], one, elsewhere.append)
        assert next(batches) == draws[4:10]
        finish(archive, claims, draws[4:10])
        finish(other, others, held[:3])
        with other.transaction():
            others.release(held[3:])  # not stored: its picture may have been no picture
        assert list(batches) == [[draws[3], *draws[10:]]]
    assert elsewhere == [3]


def test_it_waits_for_what_others_draw(archive, other, short_poll):
    draws = sweep_draws(2)
    with Claims(archive, MODEL, 1, find) as claims, Claims(other, MODEL, 1, find) as others:
        held = next(others.batches(draws, [10], one))
        timer = threading.Timer(0.2, finish, [other, others, held])
        timer.start()
        elsewhere = []
        assert list(claims.batches(draws, [10], one, elsewhere.append)) == []
        assert elsewhere == [4] and archive.count() == 4
        timer.join()


def test_an_error_gives_back_what_was_claimed(archive, other):
    draws = sweep_draws(3)
    with pytest.raises(ValueError, match="the model broke"), Claims(archive, MODEL, 1, find) as claims:
        next(claims.batches(draws, [4], one))
        raise ValueError("the model broke")
    assert other.claims() == {}
    assert not [thread for thread in threading.enumerate() if thread.name == "renew-claims"]


def test_an_archive_that_cannot_be_written_does_not_hide_the_error(tmp_path):
    draws = sweep_draws(3)
    Archive.create(tmp_path / "a.db").close()
    with Archive.open(tmp_path / "a.db", "w", timeout=0.1) as archive, archive.duplicate() as other:
        with pytest.raises(ValueError, match="the model broke"), Claims(archive, MODEL, 1, find) as claims:
            next(claims.batches(draws, [4], one))
            other.connection.execute("BEGIN IMMEDIATE")
            raise ValueError("the model broke")
        other.connection.execute("ROLLBACK")
        assert len(other.claims()) == 4  # for a minute


def test_claims_are_renewed_while_their_process_lives(archive, other):
    draws = sweep_draws(2)
    ends = lambda: {row[0] for row in other.connection.execute("SELECT expires FROM claims")}
    with Claims(archive, MODEL, 1, find, lease_s=0.3) as claims:
        next(claims.batches(draws, [10], one))
        (first,) = ends()
        while (later := ends()) == {first}:  # a first renewal, and another, or the test's time runs out
            time.sleep(0.01)
        while ends() == later:
            time.sleep(0.01)
        assert len(ends()) == 1 and min(later) > first


def test_claims_of_another_machine_last_until_they_expire(archive):
    draws = sweep_draws(2)
    with Claims(archive, MODEL, 1, find) as claims:
        with archive.transaction():
            archive.claim([claims.digest(draws[0])], "elsewhere:1:abc", time.time() + 1000)
            archive.claim([claims.digest(draws[1])], "no owner of ours", time.time() + 1000)
            archive.claim([claims.digest(draws[2])], "elsewhere:2:abc", time.time() - 1)
        assert next(claims.batches(draws, [10], one)) == draws[2:]
        with archive.transaction():
            archive.renew_claims("elsewhere:1:abc", time.time() - 1)
        batches = claims.batches(draws[:2], [10], one)
        assert next(batches) == draws[:1]
        with archive.transaction():
            archive.renew_claims("no owner of ours", time.time() - 1)
        assert next(batches) == draws[1:2]


def test_claims_of_a_machine_whose_clock_is_ahead_end_too(archive, short_poll):
    """Nobody renews them, so they are dropped long before their end; what is drawn twice for it is stored once."""
    draws = sweep_draws(2)
    with Claims(archive, MODEL, 1, find, lease_s=0.05) as claims:
        with archive.transaction():
            archive.claim([claims.digest(draws[0])], "elsewhere:1:abc", time.time() + 86400)
        batches = []
        for batch in claims.batches(draws, [10], one):
            batches.append(batch)
            finish(archive, claims, batch)
    assert batches == [draws[1:], draws[:1]]
    assert execute(archive.path, "SELECT * FROM claims") == []


def test_who_renews_is_not_silent():
    renewals = claims_module._Renewals(120)
    assert renewals.silent({"lives": 60.0, "killed": 9e9}, 0) == set()
    assert renewals.silent({"lives": 160.0, "killed": 9e9}, 100) == set()
    assert renewals.silent({"lives": 200.0, "killed": 9e9, "new": 0.0}, 121) == {"killed"}
    assert renewals.silent({"lives": 200.0, "new": 0.0}, 240) == set()
    assert renewals.silent({"lives": 200.0, "killed": 9e9}, 242) == {"lives"}  # claims anew, which count from now


def test_claims_of_a_process_that_ended_here_count_for_nothing(archive):
    draws = sweep_draws(2)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    zombie = subprocess.Popen([sys.executable, "-c", ""])  # nobody has waited for it
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    with Claims(archive, MODEL, 1, find) as claims:
        space = claims.owner.rsplit(":", 2)[0]
        assert socket.gethostname() in space
        with archive.transaction():
            for index, pid in enumerate([ended.pid, zombie.pid, os.getpid()]):
                archive.claim([claims.digest(draws[index])], f"{space}:{pid}:abc", time.time() + 1000)
        assert next(claims.batches(draws, [10], one)) == [*draws[:2], draws[3]]
    zombie.wait()


def test_a_run_that_finishes_leaves_no_claims_of_the_dead(archive):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with Claims(archive, MODEL, 1, find) as claims:
        space = claims.owner.rsplit(":", 2)[0]
        with archive.transaction():
            archive.claim([b"dead"], f"{space}:{ended.pid}:abc", time.time() + 1000)
            archive.claim([b"expired"], "elsewhere:1:abc", time.time() - 1)
    assert execute(archive.path, "SELECT * FROM claims") == []


def test_a_digest_depends_on_all_that_makes_a_draw(archive):
    values = {"prompt": "a", "sc_prompt": None, "top_k": 5, "top_p": 1.0, "temperature": 1.0, "cond_scale": 3.0}
    draw = Draw(Combination(**values), 1, 2)
    others = {"prompt": "b", "sc_prompt": "a", "top_k": 6, "top_p": 0.5, "temperature": 0.5, "cond_scale": 1.0}
    draws = [draw, *(Draw(Combination(**values | {name: value}), 1, 2) for name, value in others.items())]
    draws += [Draw(draw.combination, 0, 2), Draw(draw.combination, 1, 3), Draw(draw.combination, 2, 1)]
    digests = [Claims(archive, MODEL, 1, find).digest(each) for each in draws]
    for model in (ModelInfo("generator", "model", "1" * 64, {"layers": 1}), ModelInfo("generator", "m", "0" * 64, {})):
        digests.append(Claims(archive, model, 1, find).digest(draw))
    digests.append(Claims(archive, MODEL, 2, find).digest(draw))
    digests.append(Claims(archive, MODEL, 1, find, init_md5="0" * 32).digest(draw))
    assert len(set(digests)) == len(digests) == 14 and {len(digest) for digest in digests} == {16}
    renamed = ModelInfo("generator", "another name", "0" * 64, {"layers": 1})
    assert Claims(archive, renamed, 1, find).digest(Draw(Combination(**values), 1, 2)) == digests[0]


def test_a_draw_that_goes_on_from_other_codes_is_not_taken_for_stored(archive):
    draws = sweep_draws(2)
    with archive.transaction():
        store(archive, draws[:2])
    for init_md5, missing in (("", draws[2:]), ("0" * 32, draws)):
        with Claims(archive, MODEL, 1, find, init_md5=init_md5) as claims:
            assert list(claims.batches(draws, [len(draws)], one)) == [missing]


# What each process of the tests below runs: draws that take a while, and a line for each batch begun and stored.
WORKER = """
import sys, time
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from dm_generations.archive import Archive, ModelInfo, NewImage
from dm_generations.generate import claims as module
from dm_generations.generate.sweep import Sweep, plan
module.POLL_S = 0.05
path, batch_size, seconds = sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
model = ModelInfo("generator", "model", "0" * 64, {})
def find(archive, model):
    return next(iter(archive.models()), None)
sweep = Sweep(["a", "b", "c"], cond_scale=[1.0, 3.0], count=20)
print("ready", flush=True)
sys.stdin.readline()
with Archive.open_or_create(path) as archive:
    work = plan(sweep, archive, find(archive, model), 1)
    elsewhere = []
    with module.Claims(archive, model, 1, find) as claims:
        cost = lambda draw: 1 if draw.combination.cond_scale == 1 else 2
        for batch in claims.batches(work.draws(), [2 * batch_size], cost, elsewhere.append):
            print("begun", flush=True)
            time.sleep(seconds)
            images = [
                NewImage(**vars(draw.combination), key0=draw.key0, key1=draw.key1, quantvec=bytes(8),
                    time_start=0.0, time_end=1.0)
                for draw in batch
            ]
            with archive.transaction():
                added = archive.add_images(images, archive.model_id(model), None, None, 1)
                claims.release(batch)
            print("stored", len(batch), added, flush=True)
    print("elsewhere", work.existing_count, sum(elsewhere), flush=True)
"""
PICTURE_COUNT = 120


class Worker:
    """A process that fills an archive, started but waiting for the word."""

    def __init__(self, path, batch_size: int = 3, seconds: float = 0.05):
        command = [sys.executable, "-c", WORKER, str(ROOT), str(path), str(batch_size), str(seconds)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    def read(self, line: str) -> None:
        assert self.process.stdout.readline() == f"{line}\n", self.process.stderr.read()

    def go(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def finish(self) -> tuple[int, int, int]:
        """How many pictures it drew, how many of them were new, how many others had stored."""
        out, errors = self.process.communicate(timeout=100)
        assert (self.process.returncode, errors) == (0, "")
        batches = [list(map(int, line.split()[1:])) for line in out.splitlines() if line.startswith("stored")]
        (last,) = (line.split() for line in out.splitlines() if line.startswith("elsewhere"))
        return sum(drawn for drawn, _ in batches), sum(added for _, added in batches), int(last[1]) + int(last[2])


@pytest.fixture
def start():
    """Makes workers that are ready to go, and do not outlive the test."""
    started = []

    def start(count: int, *arguments) -> list[Worker]:
        workers = [Worker(*arguments) for _ in range(count)]
        started.extend(workers)
        for worker in workers:
            worker.read("ready")
        return workers

    yield start
    for worker in started:
        worker.process.kill()
        worker.process.communicate()


def check_whole(path) -> None:
    with Archive.open(path) as archive:
        assert archive.count() == PICTURE_COUNT
        assert [group.count for group in archive.groups()] == [20] * 6
        assert [str(problem) for problem in verify(archive)] == []
    assert execute(path, "SELECT * FROM claims") == []
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_work(tmp_path, start, count):
    """None of the pictures is drawn twice, though all start at once, and the file is not there yet."""
    path = tmp_path / "a.db"
    workers = start(count, path)
    for worker in workers:
        worker.go()
    results = [worker.finish() for worker in workers]
    assert sum(drawn for drawn, _, _ in results) == sum(added for _, added, _ in results) == PICTURE_COUNT
    for drawn, _, elsewhere in results:
        assert drawn + elsewhere == PICTURE_COUNT  # the progress of each ends at the whole
    assert sum(drawn > 0 for drawn, _, _ in results) > 1
    check_whole(path)


def test_a_killed_process_is_stood_in_for(tmp_path, start):
    path = tmp_path / "a.db"
    Archive.create(path).close()
    (killed,) = start(1, path, 10, 1000.0)
    killed.go()
    killed.read("begun")
    with Archive.open(path) as archive:
        assert len(archive.claims()) == 20  # of condition scale 1, a sequence each
    (worker,) = start(1, path)
    worker.go()
    worker.read("begun")
    killed.process.send_signal(signal.SIGKILL)
    drawn, added, elsewhere = worker.finish()
    assert (drawn, added, elsewhere) == (PICTURE_COUNT, PICTURE_COUNT, 0)
    check_whole(path)


def test_readers_see_whole_batches_and_no_errors(tmp_path, start):
    path = tmp_path / "a.db"
    Archive.create(path).close()
    workers = start(3, path, 2, 0.1)
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from dm_generations.archive import Archive, verify
while True:
    with Archive.open({str(path)!r}, timeout=5.0) as archive:
        count = archive.count()
        read = sum(1 for group in archive.groups() for _ in archive.rows(group.settings))
        print(count, read, len(list(verify(archive))), flush=True)
    if count == {PICTURE_COUNT}:
        break
"""
    reader = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert reader.stdout.readline() == "0 0 0\n"  # it reads; now there is something to read
        for worker in workers:
            worker.go()
        out, errors = reader.communicate(timeout=100)
    finally:
        reader.kill()
    assert errors == ""
    found = [tuple(map(int, line.split())) for line in out.splitlines()]
    assert all(count <= read and not problem_count for count, read, problem_count in found), found
    assert found == sorted(found) and any(0 < count < PICTURE_COUNT for count, _, _ in found)
    assert sum(worker.finish()[0] for worker in workers) == PICTURE_COUNT
    check_whole(path)


def test_claims_need_neither_jax_nor_numpy():
    code = (
        "import sys; import dm_generations.generate.claims;"
        "assert not {'jax', 'numpy', 'flax'} & {name.split('.')[0] for name in sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
