"""`generate` as a command: sweeps, resuming, what is refused, and what is left behind."""

import contextlib
import dataclasses
import hashlib
import math
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys

import jax
import numpy as np
import pytest
from decode_kit import write_archive_2022
from helpers import ROOT
from PIL import Image
from tiny import CODEBOOK_SIZE, GRID, tiny_dalle_bart, tiny_vqgan

from dm_generations.archive import Archive, verify
from dm_generations.cli import build_parser, main
from dm_generations.errors import INTERRUPTED, UserError
from dm_generations.models.loading import load_checkpoint
from dm_generations.pipelines import estimate, generate
from dm_generations.sampling.prng import row_key
from dm_generations.weights import native


def command(*words) -> int:
    """Run a command; UserErrors pass through."""
    args = build_parser().parse_args(list(map(str, words)))
    return args.run(args)


def generate_into(models, db, *words) -> int:
    defaults = ["--model", models.dalle_bart, "--codec", models.vqgan, "--batch-size", 4]
    clip = [] if "--no-score" in words else ["--clip", models.clip]
    return command("generate", "--db", db, *defaults, *clip, *words)


def rows_of(db, columns="*", order="id"):
    with contextlib.closing(sqlite3.connect(db)) as connection, connection:
        return connection.execute(f"SELECT {columns} FROM images ORDER BY {order}").fetchall()


def test_a_sweep_is_stored_whole_and_a_second_run_adds_nothing(models, tmp_path, capsys):
    db = tmp_path / "sweep.db"
    words = ["--prompts", "a boat", "a cat", "a boat", "--sc-prompts", "", "blurry", "--n", 2, "--seed", 7]
    words += ["--top-k", 0, 5, "--cond-scale", 1, 3]
    assert generate_into(models, db, *words) == 0
    assert "Added 32 images" in (printed := capsys.readouterr().out)
    assert f"decode --db {db}" in printed
    with Archive.open(db) as archive:
        assert list(verify(archive)) == []
        assert list(archive.prompts().values()) == ["a boat", "a cat"]
        assert list(archive.sc_prompts().values()) == [None, "blurry"]
        groups = archive.groups()
        assert [group.count for group in groups] == [2] * 16
        assert {model.kind for model in archive.models().values()} == {"generator", "codec", "clip"}
        for group in groups:
            rows = list(archive.rows(group.key))
            assert {(row.key0, row.key1) for row in rows} == {row_key(7, index) for index in range(2)}
            assert None not in {row.clip_score_input for row in rows}
            assert {len(row.quantvec) for row in rows} == {GRID**2 * 2}
    times = rows_of(db, "time_start, time_end, time_scored, sampler_version")
    assert all(start < end <= scored and version == 1 for start, end, scored, version in times)
    content = hashlib.md5(db.read_bytes()).hexdigest()
    assert generate_into(models, db, *words) == 0
    assert "Added 0 images" in capsys.readouterr().out
    assert hashlib.md5(db.read_bytes()).hexdigest() == content


def test_settings_and_prompts_matter_and_keys_do(models, tmp_path):
    db = tmp_path / "a.db"
    words = ["--prompts", "a boat", "a cat", "--cond-scale", 1, 5, "--temperature", 0, 1, "--n", 2]
    assert generate_into(models, db, *words, "--no-score") == 0
    blobs = rows_of(db, "quantvec", "prompt_id, cond_scale, temperature, id")
    is_same = [blobs[index] == blobs[index + 1] for index in range(0, len(blobs), 2)]
    assert is_same == [True, False] * 4  # temperature 0 ignores the key
    assert len(set(blobs)) == 12


@pytest.mark.e2e
def test_one_more_value_generates_exactly_what_is_missing(models, tmp_path, capsys):
    extended, whole = tmp_path / "extended.db", tmp_path / "whole.db"
    words = ["--prompts", "a boat", "--no-score"]
    assert generate_into(models, extended, *words, "--n", 3, "--top-k", 4) == 0
    capsys.readouterr()
    assert generate_into(models, extended, *words, "--n", 5, "--top-k", 4, 9, "--dry-run") == 0
    assert "7 to generate (3 already present)" in capsys.readouterr().out
    assert generate_into(models, extended, *words, "--n", 5, "--top-k", 4, 9) == 0
    assert "Added 7 images" in capsys.readouterr().out
    assert generate_into(models, whole, *words, "--n", 5, "--top-k", 4, 9) == 0
    columns = "top_k, key0, key1, quantvec"  # the same tokens, although each was sampled in another batch
    assert rows_of(extended, columns, columns) == rows_of(whole, columns, columns)


def test_another_model_generates_its_own_images(models, tmp_path, capsys):
    db = tmp_path / "a.db"
    other = dataclasses.replace(models, dalle_bart=tiny_dalle_bart(tmp_path / "other", seed=1))
    for used in (models, other):
        assert generate_into(used, db, "--prompts", "a boat", "--n", 2, "--no-score") == 0
    assert [generator for (generator,) in rows_of(db, "generator_id")] == [1, 1, 3, 3]


def test_dry_run_leaves_nothing_behind(models, tmp_path, capsys):
    assert generate_into(models, tmp_path / "a.db", "--prompts", "a boat", "a cat", "--n", 3, "--dry-run") == 0
    assert "6 to generate" in (printed := capsys.readouterr().out)
    assert f"{6 * GRID**2 * 2} bytes" in printed
    assert re.search(r"memory.* of 4: [\d,]+ MB", printed)
    assert re.search(r"scoring: about \d\d:\d\d", printed)
    assert generate_into(models, tmp_path / "a.db", "--prompts", "a boat", "--dry-run", "--no-score") == 0
    assert re.search(r"generating: about \d\d:\d\d", capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []


def test_an_image_takes_what_dry_run_assumes():
    path = ROOT / "archive" / "emoji.db"
    with Archive.open(path) as archive:
        token_bytes = sum(len(blob) for (blob,) in archive.scan(["quantvec"]))
        assert (path.stat().st_size - token_bytes) / archive.count() == pytest.approx(estimate.ROW_BYTES, rel=0.05)


def test_dry_run_refuses_what_a_run_refuses_and_changes_no_file(models, tmp_path):
    old = tmp_path / "2022.db"
    write_archive_2022(old, np.zeros((1, GRID**2), np.uint16))
    before = old.read_bytes()
    with pytest.raises(UserError, match="2022"):
        generate_into(models, old, "--prompts", "a boat", "--dry-run")
    assert old.read_bytes() == before


def test_prompts_from_a_file_join_those_of_the_command_line(models, tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufeffa cat\r\n\n  \na château\n".encode())
    words = ["--prompts", "a boat", "--prompts-file", tmp_path / "prompts.txt", "--n", 1, "--no-score"]
    assert generate_into(models, tmp_path / "a.db", *words) == 0
    with Archive.open(tmp_path / "a.db") as archive:
        assert list(archive.prompts().values()) == ["a boat", "a cat", "a château"]


def test_a_prompt_of_10000_characters_is_stored_whole(models, tmp_path):
    prompt = "a very long boat " * 600
    assert generate_into(models, tmp_path / "a.db", "--prompts", prompt, "--n", 1, "--no-score") == 0
    with Archive.open(tmp_path / "a.db") as archive:
        assert list(archive.prompts().values()) == [prompt]


@pytest.mark.e2e
def test_rows_have_their_dtype_and_log_probability(models, tmp_path, capsys):
    db, words = tmp_path / "a.db", ["--prompts", "a boat", "--n", 3, "--no-score"]
    assert generate_into(models, db, *words) == 0
    assert generate_into(models, db, *words, "--seed", 1, "--dtype", "bfloat16") == 0
    found = rows_of(db, "dtype, log_prob, init_count, init_md5")
    assert [row[0] for row in found] == ["float32"] * 3 + ["bfloat16"] * 3
    assert all(-16 * math.log(1000) < row[1] < 0 and row[2:] == (0, "") for row in found)
    # each in its own dtype
    assert command("verify", "--db", db, "--model", models.dalle_bart, "--batch-size", 4, "--regenerate") == 0


def test_no_same_seeds_gives_every_combination_its_own_keys(models, tmp_path):
    db = tmp_path / "a.db"
    words = ["--prompts", "a boat", "a cat", "--cond-scale", 1, 3, "--n", 2, "--no-score"]
    assert generate_into(models, db, *words, "--no-same-seeds") == 0
    assert len(set(rows_of(db, "key0, key1"))) == 8
    assert generate_into(models, db, *words) == 0
    assert len(set(rows_of(db, "key0, key1"))) == 10


@pytest.mark.e2e
def test_images_continue_initial_tokens_and_can_be_checked(models, tmp_path, capsys):
    db, init = tmp_path / "a.db", tmp_path / "init.npy"
    np.save(init, np.arange(GRID**2, dtype=np.int64).reshape(GRID, GRID))
    words = ["--prompts", "a boat", "--n", 3, "--no-score"]
    assert generate_into(models, db, *words) == 0
    assert generate_into(models, db, *words, "--init-tokens", init, "--init-count", 6) == 0
    assert "Added 3 images" in capsys.readouterr().out
    assert generate_into(models, db, *words, "--init-tokens", init, "--init-count", 6) == 0
    assert "Added 0 images" in capsys.readouterr().out
    assert generate_into(models, db, *words, "--init-tokens", init) == 0  # 7 of 16
    tokens = [np.frombuffer(blob, "<u2") for (blob,) in rows_of(db, "quantvec")]
    for count, rows in ((6, tokens[3:6]), (7, tokens[6:9])):
        assert all((row[:count] == np.arange(count)).all() for row in rows)
        assert len({row[count:].tobytes() for row in rows}) == 3
    assert len({md5 for (md5,) in rows_of(db, "init_md5")}) == 3
    for flag in ("--regenerate", "--replay"):
        assert command("verify", "--db", db, "--model", models.dalle_bart, "--batch-size", 4, flag) == 0


def test_an_image_gives_its_tokens(models, tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    Image.fromarray(colours).save(tmp_path / "image.png")
    words = ["--prompts", "a boat", "--n", 2, "--no-score", "--init-image", tmp_path / "image.png"]
    assert generate_into(models, tmp_path / "a.db", *words) == 0
    first, second = (np.frombuffer(blob, "<u2") for (blob,) in rows_of(tmp_path / "a.db", "quantvec"))
    assert (first[:7] == second[:7]).all() and (first[7:] != second[7:]).any()


def test_progressive_writes_every_unfinished_image(models, tmp_path):
    folder = tmp_path / "steps"
    words = ["--prompts", "a boat", "--n", 2, "--cond-scale", 1, 3, "--no-score", "--progressive", 6]
    assert generate_into(models, tmp_path / "a.db", *words, "--progressive-dir", folder) == 0
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 4 * 3
    assert {name.split("_")[3] for name in names} == {"0006", "0012", "0016"}
    plain = tmp_path / "plain.db"
    assert generate_into(models, plain, *words[:-2]) == 0
    assert rows_of(tmp_path / "a.db", "quantvec") == rows_of(plain, "quantvec")
    with pytest.raises(SystemExit):
        generate_into(models, plain, "--prompts", "a boat", "--progressive", 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--init-count", "3"], "--init-count"),
        (["--init-tokens", "/nowhere.npy"], "/nowhere.npy"),
        (["--init-tokens", "/nowhere.npy", "--init-image", "/nowhere.png"], "--init-image"),
        (["--n", "0"], "n must be"),
        (["--n", "5000000", "--top-k", "1", "2", "3"], "15,000,000"),
        (["--seed", "-1"], "seed must be"),
        (["--seed", str(2**64)], "seed must be"),
        (["--top-k", "5", "-1"], "top_k must be"),
        (["--top-p", "0"], "top_p must be"),
        (["--top-p", "1.01"], "top_p must be"),
        (["--top-p", "nan"], "top_p must be"),
        (["--temperature", "-0.5"], "temperature must be"),
        (["--temperature", "inf"], "temperature must be"),
        (["--temperature", "nan"], "temperature must be"),
        (["--cond-scale", "1", "inf"], "cond_scale must be"),
        (["--cond-scale", "-1"], "cond_scale must be"),
        (["--batch-size", "0"], None),
        (["--prompts", "a boat", " "], "prompt 2"),
        (["--prompts"], None),
        (["--prompts", "a\0b"], "prompt 1"),
        (["--prompts", "a \udcff"], "prompt 1"),
        (["--sc-prompts", "a\0b"], "unconditional prompt 1"),
        (["--no-score", "--clip", "folder"], "--no-score"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--clip", "/nowhere"], "/nowhere"),
        (["--prompts-file", "/nowhere.txt"], "/nowhere.txt"),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(models, tmp_path, words, message):
    with pytest.raises(SystemExit if message is None else UserError) as error:
        generate_into(models, tmp_path / "a.db", "--prompts", "a boat", *words)
    if message is None:
        assert error.value.code == 2
    else:
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_is_needed(models, tmp_path):
    with pytest.raises(UserError, match="prompts"):
        generate_into(models, tmp_path / "a.db")


def test_an_incompatible_codec_is_refused(models, tmp_path):
    coarse = tiny_vqgan(tmp_path / "coarse", ch_mult=[1, 1, 1])
    with pytest.raises(UserError, match=r"'dalle_bart'.* 16 .*'coarse'.*2x2"):
        generate_into(dataclasses.replace(models, vqgan=coarse), tmp_path / "a.db", "--prompts", "a boat")
    small = tiny_vqgan(tmp_path / "small", n_embed=CODEBOOK_SIZE - 1)
    with pytest.raises(UserError, match=r"32.*'small'.*31"):
        generate_into(dataclasses.replace(models, vqgan=small), tmp_path / "a.db", "--prompts", "a boat")
    assert not (tmp_path / "a.db").exists()


def test_a_model_without_its_tokenizer_is_refused(models, tmp_path):
    shutil.copytree(models.dalle_bart, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        generate_into(dataclasses.replace(models, dalle_bart=tmp_path / "model"), tmp_path / "a.db", "--prompts", "a")
    assert not (tmp_path / "a.db").exists()


@pytest.mark.parametrize("content", [b"", b"not a database at all, but long enough to be one " * 3])
def test_a_file_that_is_not_an_archive_is_left_alone(models, tmp_path, content):
    (tmp_path / "a.db").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.db"):
        generate_into(models, tmp_path / "a.db", "--prompts", "a boat")
    assert (tmp_path / "a.db").read_bytes() == content


def test_a_model_that_gives_only_nan_writes_no_row(models, tmp_path):
    broken = tmp_path / "broken"
    tiny_dalle_bart(broken, seed=3)
    checkpoint = load_checkpoint(broken, "generator")
    checkpoint.params["lm_head"]["kernel"] = np.full_like(checkpoint.params["lm_head"]["kernel"], np.nan)
    config = {**dataclasses.asdict(checkpoint.config)}
    native.save(broken, "dalle_bart", config, checkpoint.params)
    with pytest.raises(UserError, match="'broken'"):
        generate_into(dataclasses.replace(models, dalle_bart=broken), tmp_path / "a.db", "--prompts", "a", "--no-score")
    assert rows_of(tmp_path / "a.db") == []


def test_finished_batches_survive_a_stop_and_a_second_run_adds_the_rest(models, tmp_path, capsys, monkeypatch):
    db, words = tmp_path / "a.db", ["--prompts", "a boat", "--n", 18, "--no-score"]
    sample, batches = generate.Pipeline.sample, []

    def stop_in_the_third_batch(pipeline, samples):
        batches.append(len(samples))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return sample(pipeline, samples)

    monkeypatch.setattr(generate.Pipeline, "sample", stop_in_the_third_batch)
    flags = ["--model", models.dalle_bart, "--codec", models.vqgan, "--batch-size", 4]
    assert main([str(word) for word in ["generate", "--db", db, *flags, *words]]) == INTERRUPTED
    assert capsys.readouterr().err.splitlines()[-1].startswith("interrupted")
    assert batches == [8, 8, 2]  # two at a time, of --batch-size 4
    assert len(rows_of(db)) == 16
    monkeypatch.undo()
    assert generate_into(models, db, *words) == 0
    assert "Added 2 images" in capsys.readouterr().out
    with Archive.open(db) as archive:
        assert list(verify(archive)) == []
        assert archive.count() == 18


def test_too_little_memory_is_one_line_that_says_what_to_do(models, tmp_path, monkeypatch):
    def exhaust(pipeline, samples):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore\nlines")

    monkeypatch.setattr(generate.Pipeline, "sample", exhaust)
    with pytest.raises(UserError, match=r"memory.*--batch-size"):
        generate_into(models, tmp_path / "a.db", "--prompts", "a boat", "--no-score")


@pytest.mark.e2e
def test_a_platform_that_is_not_there_is_one_line(tmp_path):
    words = ("generate", "--db", tmp_path / "x.db", "--prompts", "a rocket", "--n", "1")
    ended = subprocess.run(
        [sys.executable, "-m", "dm_generations", *map(str, words)],
        env={**os.environ, "JAX_PLATFORMS": "abacus"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1
    assert re.fullmatch(r"error: .*JAX_PLATFORMS=abacus.*\n", ended.stderr)
    assert not list(tmp_path.iterdir())


@pytest.mark.e2e
@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_kill_in_the_middle_of_a_transaction_loses_that_batch_alone(models, tmp_path):
    db = tmp_path / "a.db"
    words = ["--db", db, "--model", models.dalle_bart, "--codec", models.vqgan, "--batch-size", 4]
    words += ["--prompts", "a boat", "--n", 12, "--no-score"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    program = ROOT / "tests" / "programs" / "generate_until_killed.py"
    killed = subprocess.run([sys.executable, str(program), "8", *map(str, words)], env=environment)
    assert killed.returncode == -signal.SIGKILL
    with Archive.open(db) as archive:
        assert archive.count() == 8  # two batches at a time
        assert list(verify(archive)) == []
    assert generate_into(models, db, "--prompts", "a boat", "--n", 12, "--no-score") == 0
    assert len(rows_of(db)) == 12
