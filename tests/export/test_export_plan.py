"""Which images are chosen, and which files they go to."""

import pytest
from decode_kit import GOLDEN_DECODE, SETTINGS

from dm_generations.archive import Archive, ImageRow, ModelInfo
from dm_generations.errors import UserError
from dm_generations.export.manifest import make_entry
from dm_generations.export.plan import GroupPlan, Layout, Selection, is_finished, select_groups
from dm_generations.models.loading import load_checkpoint


@pytest.fixture(scope="module")
def archive():
    with Archive.open(GOLDEN_DECODE / "archive.db") as opened:
        yield opened


def chosen(archive, **filters):
    return {(plan.key.prompt_id, plan.key.sc_prompt_id) for plan in select_groups(archive, Selection(**filters))}


def test_ids_and_texts_add_up_and_the_two_kinds_both_have_to_match(archive):
    assert chosen(archive, prompt_ids=[4], prompt_texts=["a facebook-branded dinosaur"]) == {
        (2, 1),
        (2, 2),
        (4, 1),
        (4, 2),
    }
    assert chosen(archive, prompt_ids=[4, 9], sc_prompt_texts=["blurry, low quality"]) == {(4, 2), (9, 2)}
    assert len(chosen(archive)) == 10


def test_n_best_bounds_each_group(archive):
    assert {plan.count for plan in select_groups(archive, Selection(n_best=2))} == {1, 2}
    assert max(plan.count for plan in select_groups(archive, Selection())) == 8


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"prompt_ids": [3]}, "no prompt with id 3; its prompt ids are 1, 2, 4, 9, 12"),
        ({"sc_prompt_ids": [1, 7]}, "no sc prompt with id 7; its sc prompt ids are 1, 2"),
        ({"prompt_texts": ["a facebook"]}, "no prompt 'a facebook'; give the whole text"),
        ({"sc_prompt_texts": ["None"]}, "no sc prompt 'None'"),
    ],
)
def test_what_the_archive_lacks_is_named(archive, filters, message):
    with pytest.raises(UserError, match=message):
        select_groups(archive, Selection(**filters))


def test_a_gallery_goes_on_to_further_pages():
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


def test_the_page_is_told_of_a_model_only_if_it_still_draws_the_image():
    plan = GroupPlan(SETTINGS, "a boat", None, 1)
    row = ImageRow(1, 1, 1, SETTINGS.params, 0, 5, b"\1\0", "ab" * 16, 31.5, 30.25, generator_id=1, codec_id=None)
    (target,) = plan.targets(Layout("images", 1, 1))

    def drawn_by(name: str, sha256: str) -> str | None:
        models = {1: ModelInfo("generator", name, sha256, {})}
        return make_entry(plan, target, target.path, [row], models).model

    embedded = load_checkpoint(None, "generator")
    assert drawn_by(embedded.name, embedded.sha256) == embedded.name
    assert drawn_by(embedded.name, "0" * 64) is None  # an earlier version's weights
    assert drawn_by("mega", "0" * 64) == "mega"
