"""Archives to Parquet and back: the same rows, whatever they hold."""

import contextlib
import json
import sqlite3

import pytest
from archive_kit import CLIP, CODEC, GENERATOR, archive_2022, execute, fill, new_image
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dm_generations.archive import Archive, ModelInfo, Selection, init_md5, merge
from dm_generations.archive.records import ClassLabel, canonical_settings
from dm_generations.archive.scores import add_scores, scorer_id
from dm_generations.archive.vocabulary import add_vocabulary
from dm_generations.atomic_io import TemporaryFile
from dm_generations.errors import UserError
from dm_generations.export.parquet import ParquetOptions, write_parquet
from dm_generations.pipelines.import_files import ImportOptions, import_files

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

# Of one generator with two configurations, say.
VARIANT = ModelInfo("generator", "tiny", GENERATOR.sha256, {"layers": 1, "guides": True})
JUDGE = ModelInfo("scorer", "eye", "d" * 64, {})
LONG_CODEC = ModelInfo("codec", "line", "e" * 64, {}, token_shape=(3,), codebook_size=65536, image_shape=(8, 24))
SCALES = ModelInfo("codec", "scales", "f" * 64, {}, ((1, 1), (2, 2)), 4096, (16, 16))
EVERYTHING = """
SELECT images.*, p.desc AS p, p.class_label AS label, v.name AS v, v.labels AS labels, s.desc AS s, {models}
FROM images JOIN prompts p ON p.id = prompt_id JOIN sc_prompts s ON s.id = sc_prompt_id
LEFT JOIN vocabularies v ON v.id = vocabulary_id
{joins} ORDER BY images.id
"""
MODELS = ("generator", "codec", "clip")
FIELDS = ("kind", "name", "sha256", "config", "token_shape", "codebook_size", "image_shape")


def everything(path) -> list[dict]:
    """All rows of an archive, with what their ids stand for in place of these."""
    models = ", ".join(f"{model}.{field} AS {model}_{field}" for model in MODELS for field in FIELDS)
    joins = " ".join(f"LEFT JOIN models {model} ON {model}.id = {model}_id" for model in MODELS)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.row_factory = sqlite3.Row
        rows = [dict(row) for row in connection.execute(EVERYTHING.format(models=models, joins=joins))]
        scores = connection.execute(
            "SELECT image_id, kind, sha256, config, reads, value, time FROM scores "
            "JOIN scorers ON scorers.id = scorer_id JOIN models ON models.id = model_id ORDER BY 1, 3, 5"
        ).fetchall()
    said: dict = {}
    for row_id, *score in scores:
        said.setdefault(row_id, []).append(tuple(score))
    for place, row in enumerate(rows):
        row["scores"] = said.get(row["id"], [])
        row["id"] = place
        for name in ("prompt_id", "sc_prompt_id", *(f"{model}_id" for model in MODELS)):
            row[name] = None
    return rows


texts = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=12)
numbers = st.floats(-1e300, 1e300)
words = st.integers(0, 2**32 - 1)


@st.composite
def groups(draw):
    """Images of one generator, codec and CLIP."""
    codec = draw(st.sampled_from([None, CODEC, LONG_CODEC, SCALES]))
    count, limit = {None: (9, 2**16), CODEC: (4, 300), LONG_CODEC: (3, 2**16), SCALES: (5, 4096)}[codec]
    tokens = st.lists(st.integers(0, limit - 1), min_size=count, max_size=count)
    images = []
    for _ in range(draw(st.integers(1, 4))):
        quantvec = b"".join(token.to_bytes(2, "little") for token in draw(tokens))
        init_count = draw(st.integers(0, count))
        extra = draw(st.dictionaries(texts.filter(bool), st.one_of(numbers, texts, st.booleans()), max_size=2))
        images.append(
            new_image(
                prompt=draw(st.one_of(texts, st.builds(ClassLabel, st.just("animals"), st.integers(0, 2)))),
                sc_prompt=draw(st.one_of(st.none(), texts)),
                top_k=draw(st.integers(0, 2**40)),
                top_p=draw(st.floats(0, 1)),
                temperature=draw(st.floats(0, 1e300)),
                cond_scale=draw(numbers),
                key0=draw(words),
                key1=draw(words),
                quantvec=quantvec,
                init_count=init_count,
                init_md5=init_md5(quantvec, init_count),
                extra_settings=canonical_settings(extra),
                time_start=draw(st.one_of(st.none(), numbers)),
                time_end=draw(st.one_of(st.none(), numbers)),
                time_scored=draw(st.one_of(st.none(), numbers)),
                clip_score_input=draw(st.one_of(st.none(), numbers)),
                clip_score_tokenized=draw(st.one_of(st.none(), numbers)),
                log_prob=draw(st.one_of(st.none(), numbers)),
                dtype=draw(st.sampled_from([None, "float32", "bfloat16"])),
            )
        )
    generator = draw(st.sampled_from([None, GENERATOR, VARIANT]))
    return images, (generator, codec, draw(st.sampled_from([None, CLIP]))), draw(st.sampled_from([None, 1, 2]))


scores = st.lists(st.tuples(st.sampled_from([(JUDGE, "image"), (CLIP, "input"), (CLIP, "tokenized")]), numbers))


def make(path, contents, said) -> None:
    with Archive.create(path) as archive, archive.transaction():
        add_vocabulary(archive.connection, "animals", ["cat", "dog", "caf\u00e9, \u2603"])
        for images, models, sampler_version in contents:
            ids = [None if model is None else archive.model_id(model) for model in models]
            archive.add_images(images, *ids, sampler_version)
        for place, ((model, reads), value) in enumerate(said):
            scorer = scorer_id(archive, archive.model_id(model), reads)
            row_id = 1 + place % archive.count()
            add_scores(archive, scorer, [(row_id, value)], None if place % 2 else 7.5)


def round_trip(path, out, into, **options) -> None:
    with Archive.open(path) as archive:
        write_parquet(archive, ParquetOptions(out, **options))
    import_files([out], into, ImportOptions())


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.lists(groups(), min_size=1, max_size=3), said=scores)
def test_an_archive_comes_back_row_by_row(tmp_path_factory, contents, said):
    folder = tmp_path_factory.mktemp("trip")
    make(folder / "a.db", contents, said)
    round_trip(folder / "a.db", folder / "set", folder / "b.db")
    assert everything(folder / "b.db") == everything(folder / "a.db")


@pytest.fixture
def archive(tmp_path):
    """Three images with scores of a judge, in two groups."""
    path = tmp_path / "a.db"
    images = [new_image(key, prompt=prompt, clip_score_input=float(key)) for key, prompt in enumerate("xxy")]
    make(path, [(images, (GENERATOR, CODEC, CLIP), 1)], [((JUDGE, "image"), 0.5), ((CLIP, "tokenized"), 2.5)])
    return path


def test_scores_models_and_texts_stay(archive, tmp_path):
    round_trip(archive, tmp_path / "set", tmp_path / "b.db")
    rows = everything(tmp_path / "b.db")
    assert rows == everything(archive)
    assert [len(row["scores"]) for row in rows] == [1, 1, 0] and {row["codec_name"] for row in rows} == {"tiny"}


def test_other_programs_read_the_columns(archive, tmp_path):
    with Archive.open(archive) as opened:
        write_parquet(opened, ParquetOptions(tmp_path / "set"))
    table = pq.read_table(tmp_path / "set" / "data").to_pylist()
    assert [row["prompt"] for row in table] == ["x", "x", "y"]
    assert table[2]["tokens"] == [2, 2, 3, 4] and json.loads(table[2]["token_shape"]) == [2, 2]
    assert table[0]["scores"][0]["value"] == 0.5 and table[0]["codec_sha256"] == CODEC.sha256


def test_filters_apply_both_ways(archive, tmp_path):
    round_trip(archive, tmp_path / "set", tmp_path / "b.db", selection=Selection.of(prompt="x"))
    assert [row["p"] for row in everything(tmp_path / "b.db")] == ["x", "x"]
    best = ImportOptions(selection=Selection.of(best=1))
    for name, expected in (("c.db", 1), ("b.db", 0)):  # a new archive, and one that has the image
        report = import_files([tmp_path / "set"], tmp_path / name, best)
        assert (report.image_count, report.added_count) == (1, expected)
    assert [row["key1"] for row in everything(tmp_path / "c.db")] == [1]
    with pytest.raises(UserError, match=r"set.*nothing"):
        import_files([tmp_path / "set"], tmp_path / "d.db", ImportOptions(selection=Selection.of(prompt="nothing")))
    assert not (tmp_path / "d.db").exists()


def test_an_archive_that_has_images_gets_the_others(archive, tmp_path):
    round_trip(archive, tmp_path / "set", tmp_path / "b.db")
    execute(tmp_path / "b.db", "DELETE FROM images WHERE id = 3")
    report = import_files([tmp_path / "set"], tmp_path / "b.db", ImportOptions())
    assert (report.image_count, report.added_count) == (3, 1)
    assert everything(tmp_path / "b.db") == everything(archive)


@pytest.mark.e2e
def test_many_files_are_one_set_and_none_may_be_missing(archive, tmp_path):
    with Archive.open(archive, "w") as opened:
        fill(opened, *(new_image(key, prompt="many", quantvec=bytes(8)) for key in range(20_001)))
    round_trip(archive, tmp_path / "set", tmp_path / "b.db", file_bytes=1)
    files = sorted((tmp_path / "set" / "data").iterdir())
    assert len(files) == 2 and everything(tmp_path / "b.db") == everything(archive)
    files[0].rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=files[0].name):
        import_files([tmp_path / "set"], tmp_path / "c.db", ImportOptions())


def cut(file):
    file.write_bytes(file.read_bytes()[:-20])


def spoil(file):
    content = bytearray(file.read_bytes())
    content[4:2000] = b"\xff" * 1996
    file.write_bytes(content)


def without(*names):
    def drop(file):
        pq.write_table(pq.read_table(file).drop_columns(list(names)), file)

    return drop


def replaced(name, value):
    def replace(file):
        table = pq.read_table(file)
        column = pa.array([value] * len(table))
        table = table.set_column(table.schema.get_field_index(name), name, column)
        pq.write_table(table, file)

    return replace


def rewritten(change):
    def rewrite(file):
        table = pq.read_table(file)
        facts = json.loads(table.schema.metadata[b"dm_generations"])
        change(facts)
        pq.write_table(table.replace_schema_metadata({"dm_generations": json.dumps(facts)}), file)

    return rewrite


@pytest.mark.e2e
@pytest.mark.parametrize(
    "damage",
    [
        *(cut, spoil, lambda file: file.write_bytes(b""), lambda file: file.write_bytes(b"PAR1" * 10)),
        *(without("tokens"), without("key0", "scores"), replaced("tokens", "a"), replaced("tokens", [70_000] * 4)),
        *(replaced("tokens", [299, 300, 0, 0]), replaced("tokens", [1]), replaced("tokens", None)),
        *(replaced("top_p", 2.0), replaced("top_k", "many"), replaced("codec_id", 99), replaced("codec_id", 1)),
        *(replaced("quantvec_md5", "0" * 32), replaced("extra_settings", "{ }"), replaced("class_label", 7)),
        *(replaced("init_count", 5), replaced("dtype", "int4"), replaced("time_start", "now")),
        *(rewritten(lambda facts: facts.clear()), rewritten(lambda facts: facts.update(version=99))),
        *(rewritten(lambda facts: facts.update(models=[1])), rewritten(lambda facts: facts["models"].pop())),
        rewritten(lambda facts: facts["models"][1].update(token_shape="[[")),
    ],
)
def test_a_damaged_file_adds_nothing(damage, archive, tmp_path):
    with Archive.open(archive) as opened:
        write_parquet(opened, ParquetOptions(tmp_path / "set"))
    (file,) = (tmp_path / "set" / "data").iterdir()
    damage(file)
    before = everything(archive)
    for target in (tmp_path / "new.db", archive):
        with pytest.raises(UserError, match=r"train-00000.*\.parquet") as error:
            import_files([tmp_path / "set"], target, ImportOptions())
        assert "\n" not in str(error.value)
    assert everything(archive) == before and {path.name for path in tmp_path.iterdir()} == {"a.db", "set"}


@pytest.mark.parametrize(
    "change", ["quantvec = x'01'", "quantvec_md5 = 'x'", "extra_settings = '{ }'", "prompt_id = 99", "top_k = 'many'"]
)
def test_a_damaged_row_writes_nothing(change, archive, tmp_path):
    with contextlib.closing(sqlite3.connect(archive)) as connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute(f"UPDATE images SET {change} WHERE id = 2")
        connection.commit()
    with Archive.open(archive) as opened, pytest.raises(UserError, match="image"):
        write_parquet(opened, ParquetOptions(tmp_path / "set"))
    assert not (tmp_path / "set").exists()


def test_an_export_that_is_stopped_leaves_nothing(archive, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with Archive.open(archive) as opened, pytest.raises(KeyboardInterrupt):
        write_parquet(opened, ParquetOptions(tmp_path / "set"), on_progress=stop)
    assert not (tmp_path / "set").exists()


def test_two_exports_do_not_share_a_folder(archive, tmp_path):
    (tmp_path / "set" / "data").mkdir(parents=True)
    other = TemporaryFile(tmp_path / "set" / "data")
    with Archive.open(archive) as opened:
        with pytest.raises(UserError, match="data"):
            write_parquet(opened, ParquetOptions(tmp_path / "set"))
        assert other.path.exists()
        other.discard()
        left = tmp_path / "set" / "data" / other.path.name
        left.write_bytes(b"of a killed one")
        write_parquet(opened, ParquetOptions(tmp_path / "set"))
    assert not left.exists()


def test_a_set_is_not_written_over(archive, tmp_path):
    with Archive.open(archive) as opened:
        write_parquet(opened, ParquetOptions(tmp_path / "set"))
        before = {path: path.read_bytes() for path in (tmp_path / "set").rglob("*") if path.is_file()}
        with pytest.raises(UserError, match="set"):
            write_parquet(opened, ParquetOptions(tmp_path / "set"))
        with pytest.raises(UserError, match="mit"):
            write_parquet(opened, ParquetOptions(tmp_path / "other", licence="MIT\n---"))
    assert {path: path.read_bytes() for path in (tmp_path / "set").rglob("*") if path.is_file()} == before


def test_an_archive_of_2022_becomes_one_of_the_newest_format(tmp_path):
    path = archive_2022(tmp_path / "old.db")
    values = "(4, 7, 1, 50, 1, 1, 3.0, 1, 2, x'01000200', NULL, 5.5, NULL)"
    execute(path, f"INSERT INTO images VALUES {values}, {values.replace('4, 7', '9, 3').replace('0200', '0300')}")
    round_trip(path, tmp_path / "set", tmp_path / "new.db")
    merge([path], tmp_path / "merged.db")
    assert everything(tmp_path / "new.db") == everything(tmp_path / "merged.db")
    execute(path, "UPDATE images SET top_k = 50.5 WHERE id = 9")
    with pytest.raises(UserError, match="top_k"):
        round_trip(path, tmp_path / "other", tmp_path / "other.db")
