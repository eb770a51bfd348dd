"""CLIP's tokenizer from vocab.json and merges.txt."""

from text_kit import clip_vocab, write_tokenizer

from dm_generations.models.registry import load_tokenizer


def test_clip_from_vocab_and_merges(tmp_path):
    clip = load_tokenizer(write_tokenizer("clip", tmp_path), "clip", len(clip_vocab()))
    ids, mask = clip.encode(["A  CAT's", None], 6)
    assert ids.tolist() == [[514, 320, 513, 6, 82 + 256, 515], [514, 515, 515, 515, 515, 515]]
    assert mask.tolist() == [[1] * 6, [1, 1, 0, 0, 0, 0]]
    assert clip.round_trip("A  CAT", 6) == "a cat"
    assert clip.encode(["a <|EndOfText|>"], 6)[0].tolist() == [[514, 320, 515, 515, 515, 515]]
