"""File names: the 2022 script's where they can exist, and safe whatever a prompt holds."""

import os
import unicodedata

from hypothesis import given
from hypothesis import strategies as st
from pathvalidate import sanitize_filename

from dm_generations.export.plan import make_file_name, make_folder_name

HOSTILE = [
    "",
    ".",
    "..",
    "../../etc/passwd",
    "a/b",
    "a\\b",
    "C:\\x",
    "CON",
    "nul.txt",
    "x. . .",
    "x   ",
    "\0",
    "a\nb",
]
HOSTILE += [
    "\ud800",
    "\u202egnp",
    "~",
    "-rf",
    "$(rm)",
    "%00",
    "\U0001f951" * 10_000,
    "x" * 10_000,
    "e\u0301" * 300,
]

texts = st.one_of(st.none(), st.sampled_from(HOSTILE), st.text(max_size=400))
ids = st.integers(-5, 2**63 - 1)
numbers = st.floats()
settings = st.tuples(ids, st.integers(0, 2**63 - 1), numbers, numbers, numbers)
places = st.fixed_dictionaries(
    {
        "rank": st.one_of(st.none(), st.integers(0, 10**6)),
        "page": st.integers(0, 1000),
        "is_incomplete": st.booleans(),
    }
)


def same_to_a_file_system(name: str) -> str:
    """What is left of a name where case and normalisation do not count."""
    return unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", name).casefold())


def test_reads_as_in_2022():
    assert make_folder_name(7, "a cute avocado") == "0007_a cute avocado"
    assert make_file_name(1, 50, 1.0, 0.7, 10.0, None, rank=3) == "0001_k=50,p=1.0,t=0.7,c=10.0_03_None.png"
    assert make_file_name(2, 0, 0.95, 3.0, 1.0, "blurry") == "0002_k=0,p=0.95,t=3.0,c=1.0_blurry.png"
    assert make_file_name(1, 0, 1.0, 1.0, 1.0, "x", page=1) == "0001_k=0,p=1.0,t=1.0,c=1.0,page=2_x.png"


@given(prompt_id=ids, prompt=texts)
def test_a_folder_name_is_one_safe_path_component(prompt_id, prompt):
    name = make_folder_name(prompt_id, prompt)
    assert_safe(name)
    assert not name.endswith((" ", "."))


@given(settings, texts, places)
def test_a_file_name_is_one_safe_path_component(values, sc_prompt, place):
    name = make_file_name(*values, sc_prompt, **place)
    assert_safe(name)
    assert name.endswith(".png")


def assert_safe(name: str):
    assert 0 < len(name.encode()) <= 255
    assert not set(name) & set('/\\:*?"<>|') and min(name) >= " " and "\x7f" not in name
    assert name[0].isdigit() or name[0] == "-"
    assert os.path.normpath(os.path.join("out", name)) == os.path.join("out", name)


@given(ids, texts, ids, texts)
def test_two_prompts_never_share_a_folder(one, prompt, other, other_prompt):
    name, other_name = make_folder_name(one, prompt), make_folder_name(other, other_prompt)
    assert one == other or same_to_a_file_system(name) != same_to_a_file_system(other_name)


@given(settings, texts, places, settings, texts, places, st.booleans(), st.booleans())
def test_two_images_never_share_a_name(values, text, place, values_2, text_2, place_2, same_values, is_gallery):
    # Within one folder a run writes either ranks or pages, and an unconditional prompt's id fixes its text.
    values_2 = values if same_values else values_2
    text_2 = text if values[0] == values_2[0] else text_2
    if is_gallery:
        place, place_2 = place | {"rank": None}, place_2 | {"rank": None}
    else:
        place, place_2 = ({"rank": one["rank"] or 0} for one in (place, place_2))
    keys = {(repr(values), *sorted(place.items())), (repr(values_2), *sorted(place_2.items()))}
    names = {
        same_to_a_file_system(make_file_name(*values, text, **place)),
        same_to_a_file_system(make_file_name(*values_2, text_2, **place_2)),
    }
    assert len(names) == len(keys)


@given(st.integers(0, 99999), st.text(st.characters(exclude_categories=["Cs"]), max_size=300), st.integers(0, 99))
def test_names_are_pathvalidates_where_those_can_exist(number, text, rank):
    assert make_folder_name(number, text) == sanitize_filename(f"{number:04d}_{text}")
    settings_text = f"{number:04d}_k=50,p=1.0,t=0.7,c=10.0_{rank:02d}"
    name_2022 = sanitize_filename(f"{settings_text}_{text}")[:250] + ".png"
    name = make_file_name(number, 50, 1.0, 0.7, 10.0, text, rank=rank)
    if len(name_2022.encode()) <= 255:
        assert name == name_2022
    else:
        assert name_2022.startswith(name.removesuffix(".png")) and len(name.encode()) > 251
