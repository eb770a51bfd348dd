"""Archives to Parquet and back: the same rows, whatever they hold."""

import contextlib
import sqlite3

import pytest
from archive_kit import CLIP, CODEC, GENERATOR, new_image
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dm_generations.archive import Archive, ModelInfo, init_md5
from dm_generations.archive.records import ClassLabel, canonical_settings
from dm_generations.archive.scores import add_scores, scorer_id
from dm_generations.archive.vocabulary import add_vocabulary
from dm_generations.export.parquet import ParquetOptions, write_parquet
from dm_generations.pipelines.import_files import ImportOptions, import_files

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
