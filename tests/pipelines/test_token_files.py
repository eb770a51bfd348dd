"""Files of others with tokens: read, checked against the codec, and stored with its name."""

import csv
import io
import json
import tarfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from dm_generations.archive import Archive, Selection
from dm_generations.cli import main
from dm_generations.errors import UserError
from dm_generations.models.loading import load_checkpoint
from dm_generations.pipelines.import_files import ImportOptions, import_files

GRID, CODEBOOK_SIZE = 8, 4096  # of the codec that ships
pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")
LENGTH = GRID**2
TOKENS = np.random.default_rng(0).integers(0, CODEBOOK_SIZE, (3, LENGTH))
PROMPTS = ("a red cube", 'd\u00e9j\u00e0, "vu"', "")


def write_labels(path, rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def json_lines(folder):
    lines = [{"prompt": prompt, "tokens": tokens.tolist()} for prompt, tokens in zip(PROMPTS, TOKENS, strict=True)]
    lines[1]["tokens"] = TOKENS[1].reshape(GRID, GRID).tolist()
    lines[1]["url"] = "something else"
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return folder / "a.jsonl", None


def samples(folder):
    members = {}
    for place, (prompt, tokens) in enumerate(zip(PROMPTS, TOKENS, strict=True)):
        members[f"x/{place}.a.png"] = b"not looked at"
        members[f"x/{place}.json"] = json.dumps({"tokens": tokens.tolist()}).encode()
        members[f"x/{place}.txt"] = prompt.encode()
    return write_tar(folder / "a.tar", members), None


def table(folder):
    columns = {"prompt": list(PROMPTS), "tokens": TOKENS.tolist(), "other": [1, 2, 3]}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "a.parquet")
    return folder / "a.parquet", None


def folder_of_arrays(folder):
    rows = []
    for place, dtype in enumerate(("<i8", ">u2", "<i4")):
        name = f"0001_x/{place}.npy"
        (folder / "arrays" / name).parent.mkdir(exist_ok=True, parents=True)
        np.save(folder / "arrays" / name, TOKENS[place].reshape(GRID, GRID).astype(dtype))
        rows.insert(0, {"file_name": name, "prompt": PROMPTS[place]})
    return folder / "arrays", write_labels(folder / "labels.csv", rows)


def one_array(folder):
    np.save(folder / "a.npy", TOKENS.reshape(3, GRID, GRID))
    return folder / "a.npy", write_labels(folder / "labels.csv", [{"prompt": prompt} for prompt in PROMPTS])


def tensors(folder):
    save_file({"a": TOKENS[:2].astype(np.int32), "b": TOKENS[2].astype(np.int32)}, folder / "a.safetensors")
    return folder / "a.safetensors", write_labels(folder / "labels.csv", [{"prompt": prompt} for prompt in PROMPTS])


@pytest.mark.parametrize("write", [json_lines, samples, table, folder_of_arrays, one_array, tensors])
def test_tokens_and_prompts_are_stored_with_the_codec(write, tmp_path):
    path, labels = write(tmp_path)
    report = import_files([path], tmp_path / "new.db", ImportOptions(None, labels))
    assert (report.image_count, report.added_count) == (3, 3)
    with Archive.open(tmp_path / "new.db") as archive:
        rows, prompts, stored = list(archive.read_rows([1, 2, 3])), archive.prompts(), archive.models()
        assert [prompts[row.prompt_id] for row in rows] == list(PROMPTS)
        np.testing.assert_array_equal([np.frombuffer(row.quantvec, "<u2") for row in rows], TOKENS)
        assert {stored[row.codec_id].sha256 for row in rows} == {load_checkpoint(None, "codec").sha256}
        assert {row.generator_id for row in rows} == {None}
    again = import_files([path], tmp_path / "new.db", ImportOptions(None, labels))
    assert again.added_count == 0


def test_settings_that_are_known_are_stored(tmp_path):
    values = {"top_k": 50, "top_p": 0.5, "temperature": 0, "cond_scale": -1.5, "key0": 2**32 - 1, "key1": 7}
    values |= {"sc_prompt": "blur", "clip_score_input": 3, "log_prob": -2.5, "dtype": "bfloat16"}
    one = {"prompt": "x", "tokens": TOKENS[0].tolist(), **values}
    (tmp_path / "a.jsonl").write_text(json.dumps(one))
    labels = write_labels(tmp_path / "labels.csv", [{"prompt": "x", **values}])
    np.save(tmp_path / "a.npy", TOKENS[0])
    for name, with_labels in (("a.jsonl", None), ("a.npy", labels)):
        import_files([tmp_path / name], tmp_path / f"{name}.db", ImportOptions(None, with_labels))
        with Archive.open(tmp_path / f"{name}.db") as archive:
            (row,) = archive.read_rows([1])
            found = {key: getattr(row.params, key, getattr(row, key, None)) for key in values}
            assert found | {"sc_prompt": archive.sc_prompts()[row.sc_prompt_id]} == values


@pytest.mark.e2e
def test_what_decode_and_export_wrote_comes_back(models, tmp_path):
    path, labels = one_array(tmp_path)
    import_files([path], tmp_path / "a.db", ImportOptions(None, labels))
    assert main(["decode", str(tmp_path / "a.db"), "--mode", "tar", "--out-dir", str(tmp_path / "shards")]) == 0
    assert main(["export", str(tmp_path / "a.db"), "--to", "jsonl", "--out", str(tmp_path / "b.jsonl")]) == 0
    for source in (*(tmp_path / "shards").iterdir(), tmp_path / "b.jsonl"):
        import_files([source], tmp_path / "b.db", ImportOptions())
        with Archive.open(tmp_path / "a.db") as first, Archive.open(tmp_path / "b.db") as second:
            assert [row.quantvec_md5 for row in second.read_rows(range(9))] == [
                row.quantvec_md5 for row in first.read_rows(first.image_ids())
            ]
        (tmp_path / "b.db").unlink()
        with pytest.raises(UserError, match="codec"):  # of others
            import_files([source], tmp_path / "b.db", ImportOptions(str(models.vqgan)))


def test_filters_apply(tmp_path):
    path, labels = one_array(tmp_path)
    options = ImportOptions(None, labels, Selection.of(prompt=PROMPTS[1]))
    report = import_files([path], tmp_path / "new.db", options)
    assert (report.image_count, report.added_count) == (1, 1)


def line(**values):
    def write(folder):
        (folder / "bad.jsonl").write_text(json.dumps({"tokens": TOKENS[0].tolist(), **values}))

    return write


def text(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def array(value):
    return lambda folder: np.save(folder / "bad.npy", value, allow_pickle=True)


def cut_tar(folder):
    path, _ = samples(folder)
    (folder / "bad.tar").write_bytes(path.read_bytes()[:2048])


def long_tar_header(folder):
    with tarfile.open(folder / "bad.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.json")
        info.pax_headers = {"comment": "x" * (2 << 20)}
        tar.addfile(info)


def huge_header(folder):
    with open(folder / "bad.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (1 << 50, LENGTH)})


BAD = [
    *(
        line(tokens=None),
        line(tokens=[]),
        line(tokens="a"),
        line(tokens=[0] * (LENGTH - 1)),
        line(tokens=[-1] * LENGTH),
    ),
    *(line(tokens=[0.5] * LENGTH), line(tokens=[1 << 70] * LENGTH), line(tokens=[CODEBOOK_SIZE] * LENGTH)),
    *(line(tokens=[["a"]]), line(prompt=7), line(prompt="\ud800"), line(top_k=0.5), line(top_k="x")),
    *(line(top_p=2), line(temperature=-1), line(key0=-1), line(key1=1 << 32), line(cond_scale=True), line(top_k=-1)),
    *(line(codec_sha256="a" * 64), line(extra_settings="{ }"), line(init_count=99), line(quantvec_md5="0" * 32)),
    *(text("bad.jsonl", b'{"tokens": [1,'), text("bad.jsonl", b"[1]"), text("bad.jsonl", b"[" * 100_000)),
    *(text("bad.jsonl", b""), text("bad.npy", b""), text("bad.npy", b"\x93NUMPY\x01\0"), text("bad.tar", b"")),
    *(
        text("bad.tar", b"\0" * 100),
        text("bad.safetensors", b"\xff" * 20),
        text("bad.parquet", b""),
        text("bad.db", b""),
    ),
    *(array(TOKENS[0] + 0.5), array(TOKENS[0] - 99), array(np.array([{}])), array(TOKENS[:, :-1]), array(TOKENS[:0])),
    *(cut_tar, huge_header, long_tar_header, lambda folder: (folder / "bad").mkdir(), lambda folder: None),
    lambda folder: write_tar(folder / "bad.tar", {"a.txt": b"a prompt"}),
    lambda folder: write_tar(folder / "bad.tar", {"a.json": b"{}"}),
]


@pytest.mark.e2e
@pytest.mark.parametrize("write", BAD)
def test_a_bad_file_is_one_line_and_adds_nothing(write, tmp_path):
    write(tmp_path)
    bad = next(iter(tmp_path.glob("bad*")), tmp_path / "bad")
    before = set(tmp_path.iterdir())
    with pytest.raises(UserError, match="bad") as error:
        import_files([bad], tmp_path / "new.db", ImportOptions())
    assert "\n" not in str(error.value) and set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "labels",
    [
        *(b"", b"text\na\nb\nc\n", b"prompt\na\nb\n", b"prompt\na\nb\nc\nd\n", b"prompt\n\xff\nb\nc\n"),
        *(b'prompt\n"a\nb\nc\n', b"prompt,top_k\na,1\nb,x\nc,3\n"),
    ],
)
def test_wrong_labels_are_one_line_and_add_nothing(labels, tmp_path):
    np.save(tmp_path / "a.npy", TOKENS)
    (tmp_path / "labels.csv").write_bytes(labels)
    with pytest.raises(UserError) as error:
        import_files([tmp_path / "a.npy"], tmp_path / "new.db", ImportOptions(None, tmp_path / "labels.csv"))
    assert "\n" not in str(error.value) and not (tmp_path / "new.db").exists()


def test_a_file_without_labels_is_named(tmp_path):
    path, labels = folder_of_arrays(tmp_path)
    np.save(path / "more.npy", TOKENS[0])
    with pytest.raises(UserError, match=r"more\.npy"):
        import_files([path], tmp_path / "new.db", ImportOptions(None, labels))
