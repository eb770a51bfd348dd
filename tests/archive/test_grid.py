"""Which images the cells of a grid show."""

import pytest
from archive_kit import archive_2022, execute, fill, new_image

from dm_generations.archive import Archive, Selection
from dm_generations.archive.grid import plan_grid
from dm_generations.errors import UserError

PROMPTS, SCALES, KEYS = ("a cat", "a dog"), (1.0, 3.0, 10.0), range(5)


def score(prompt: int, scale: int, key: int) -> float:
    """Different for all, and best for another key in each cell."""
    return float((7 * key + 3 * scale + prompt) % 5) + prompt / 10


@pytest.fixture
def archive(tmp_path):
    """Every prompt at every scale with the same keys."""
    with Archive.create(tmp_path / "a.db") as archive:
        fill(
            archive,
            *(
                new_image(key, prompt=prompt, cond_scale=value, clip_score_input=score(i, j, key))
                for i, prompt in enumerate(PROMPTS)
                for j, value in enumerate(SCALES)
                for key in KEYS
            ),
        )
        yield archive


def rows(archive, **filters):
    return list(archive.read_rows(archive.image_ids(where=compiled(archive, **filters))))


def compiled(archive, **filters):
    from dm_generations.archive.selection import compile_selection

    return compile_selection(archive, Selection.of(**filters))


@pytest.mark.parametrize(("cell", "count"), [("best1", 1), ("best4", 4), ("best9", len(KEYS))])
def test_cells_hold_the_best_images_of_their_place(archive, cell, count):
    grid = plan_grid(archive, Selection(), ["prompt", "cond_scale"], cell)
    prompts, scales = grid.axes
    assert list(prompts.labels.values()) == list(PROMPTS) and list(scales.labels.values()) == ["1", "3", "10"]
    assert len(grid.cells) == len(PROMPTS) * len(SCALES)
    for (prompt, scale), ids in grid.cells.items():
        expected = rows(archive, prompt=prompts.labels[prompt], cond_scale=scale[0])[:count]
        assert list(ids) == [row.id for row in expected]
        assert [grid.scores[row_id] for row_id in ids] == [row.clip_score_input for row in expected]
    assert grid.fixed["top_k"] == "50" and not {"seed", "prompt", "cond_scale"} & grid.fixed.keys()


def test_the_same_seed_is_in_all_cells(archive):
    with archive.transaction():
        archive.connection.execute("DELETE FROM images WHERE key1 > 1 AND cond_scale = 1")
    grid = plan_grid(archive, Selection(), ["prompt", "cond_scale"], "same-seed")
    found = [row for ids in grid.cells.values() for row in archive.read_rows(ids)]
    assert len(found) == len(PROMPTS) * len(SCALES)
    totals = {key: sum(score(i, j, key) for i in range(2) for j in range(3)) for key in (0, 1)}
    assert {row.key1 for row in found} == {max(totals, key=totals.__getitem__)}
    assert grid.fixed["seed"] == f"{found[0].key0}: {found[0].key1}"


def test_pages_and_keys_are_axes(archive):
    grid = plan_grid(archive, Selection.of(cond_scale="3.."), ["prompt", "seed", "cond_scale"])
    assert len(grid.cells) == len(PROMPTS) * 2 * len(KEYS) and all(len(ids) == 1 for ids in grid.cells.values())
    assert list(grid.axes[1].labels.values()) == [f"1: {key}" for key in KEYS]
    assert list(grid.axes[2].labels.values()) == ["3", "10"]


def test_images_without_a_score_come_last(tmp_path):
    with Archive.create(tmp_path / "a.db") as archive:
        fill(archive, new_image(0), new_image(1, clip_score_input=-5.0), new_image(2))
        grid = plan_grid(archive, Selection(), ["prompt", "model"], "best4")
        assert list(grid.cells.values()) == [[2, 1, 3]] and grid.scores == {1: None, 2: -5.0, 3: None}


def test_axes_that_still_vary_are_named_with_values_and_remedy(archive):
    with pytest.raises(UserError) as caught:
        plan_grid(archive, Selection(), ["top_k", "top_p"])
    message = str(caught.value)
    for part in ("prompt", "a cat", "a dog", "--prompt-ids 1", "cond_scale", "10", "--where cond_scale=1", "--pages"):
        assert part in message
    with pytest.raises(UserError, match="cond_scale") as caught:
        plan_grid(archive, Selection.of(prompt="a cat"), ["top_k", "top_p", "prompt"])
    assert "--pages" not in str(caught.value) and "a cat" not in str(caught.value)


@pytest.mark.parametrize(
    ("axes", "cell", "named"),
    [
        (["prompt", "colour"], "best1", "colour"),
        (["prompt", "prompt"], "best1", "prompt"),
        (["prompt", "cond_scale"], "best7", "best7"),
        (["cond_scale", "seed"], "same-seed", "seed"),
    ],
)
def test_wrong_names_are_errors(archive, axes, cell, named):
    with pytest.raises(UserError, match=named):
        plan_grid(archive, Selection(), axes, cell)


def test_an_archive_without_images_is_an_error(tmp_path):
    with Archive.create(tmp_path / "a.db") as archive, pytest.raises(UserError, match=r"a\.db"):
        plan_grid(archive, Selection(), ["prompt", "top_k"], "same-seed")


def test_the_layout_of_2022_has_grids_too_whatever_it_holds(tmp_path):
    path = archive_2022(tmp_path / "2022.db")
    for row_id, value in enumerate((3.0, "\x1b[31m", b"x", None)):
        execute(path, "INSERT INTO images VALUES (?, 3, 1, 50, 1.0, 1.0, ?, 0, ?, ?, NULL, NULL, NULL)",
                row_id + 1, value, row_id, b"12")  # fmt: skip
    with Archive.open(path) as archive:
        grid = plan_grid(archive, Selection(), ["prompt", "cond_scale"])
        assert len(grid.axes[1].labels) == 4 and next(iter(grid.axes[1].labels.values())) == "3"
        assert sorted(row_id for ids in grid.cells.values() for row_id in ids) == [1, 2, 3, 4]
