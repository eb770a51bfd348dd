"""Which images are chosen, and which files they go to."""

import pytest
from decode_kit import SETTINGS, change, random_tokens, write_archive_2022

from dm_generations.archive import Archive, ImageRow, ModelInfo, Selection
from dm_generations.errors import UserError
from dm_generations.export.manifest import make_entry
from dm_generations.export.plan import GroupPlan, Layout, is_finished, select_groups
from dm_generations.models.loading import load_checkpoint

PROMPTS = ("a boat", "a cat", "a cat in a boat")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Three prompts with ids from 1 on, each with two images of every unconditional prompt, of ids 1 (None) and 2."""
    path = write_archive_2022(tmp_path_factory.mktemp("archive") / "a.db", random_tokens(4, 4, 9), PROMPTS)
    change(path, "UPDATE images SET sc_prompt_id = 2 WHERE key1 >= 2")
    change(path, "DELETE FROM images WHERE prompt_id = 3 AND key1 IN (0, 2)")
    with Archive.open(path) as opened:
        yield opened


def chosen(archive, **filters):
    return {(plan.key.prompt_id, plan.key.sc_prompt_id) for plan in select_groups(archive, Selection(**filters))}


def test_ids_and_texts_add_up_and_the_two_kinds_both_have_to_match(archive):
    assert chosen(archive, prompt_ids=[3], prompt_texts=["a boat"]) == {(1, 1), (1, 2), (3, 1), (3, 2)}
    assert chosen(archive, prompt_ids=[2, 3], sc_prompt_texts=["blurry"]) == {(2, 2), (3, 2)}
    assert len(chosen(archive)) == 6


def test_n_best_bounds_each_group(archive):
    assert {plan.count for plan in select_groups(archive, Selection(n_best=1))} == {1}
    assert sorted(plan.count for plan in select_groups(archive, Selection(n_best=9))) == [1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"prompt_ids": [1, 7]}, r"a\.db .*prompt .*\b7\b.* 1, 2, 3"),
        ({"sc_prompt_ids": [1, 7]}, r"a\.db .*sc prompt .*\b7\b.* 1, 2"),
        ({"prompt_texts": ["a cat in"]}, r"a\.db .*prompt 'a cat in'"),
        ({"sc_prompt_texts": ["None"]}, r"a\.db .*sc prompt 'None'"),
    ],
)
def test_what_is_not_in_the_archive_is_named(archive, filters, message):
    with pytest.raises(UserError, match=message):
        select_groups(archive, Selection(**filters))


def test_a_gallery_continues_on_further_pages():
    plan = GroupPlan(SETTINGS, "a boat", None, count=9)
    targets = list(plan.targets(Layout("gallery", 2, 2)))
    assert [target.path.removeprefix("0001_a boat/") for target in targets] == [
        "0001_k=50,p=1.0,t=1.0,c=10.0_None.png",
        "0001_k=50,p=1.0,t=1.0,c=10.0,page=2_None.png",
        "0001_k=50,p=1.0,t=1.0,c=10.0,page=3_None.png",
    ]
    assert [target.ranks for target in targets] == [range(0, 4), range(4, 8), range(8, 9)]


def test_only_a_file_with_content_is_finished(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "whole.png").write_bytes(b"x")
    assert [is_finished(tmp_path, name) for name in ("empty.png", "folder.png", "none.png", "a\0b")] == [False] * 4
    assert is_finished(tmp_path, "whole.png")


def test_the_page_names_a_model_only_if_it_still_generates_the_image():
    plan = GroupPlan(SETTINGS, "a boat", None, 1)
    row = ImageRow(1, 1, 1, SETTINGS.params, 0, 5, b"\1\0", "ab" * 16, 31.5, 30.25, generator_id=1, codec_id=None)
    layout = Layout("images", 1, 1)
    (target,) = plan.targets(layout)

    def model_of(name: str, sha256: str) -> str | None:
        models = {1: ModelInfo("generator", name, sha256, {})}
        return make_entry(plan, target, target.path, [row], models, layout).model

    embedded = load_checkpoint(None, "generator")
    assert model_of(embedded.name, embedded.sha256) == embedded.name
    assert model_of(embedded.name, "0" * 64) is None  # an earlier version's weights
    assert model_of("mega", "0" * 64) == "mega"
