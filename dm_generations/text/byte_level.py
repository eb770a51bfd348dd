"""BART's and CLIP's tokenizers of a model folder: `tokenizer.json`, or the older `vocab.json` and `merges.txt`.

The pipelines made from the older pair are those that transformers makes of it (`convert_slow_tokenizer`).
"""

import re
from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from tokenizers.decoders import ByteLevel as ByteLevelDecoder

from dm_generations.errors import UserError
from dm_generations.text.files import parse_merges, parse_vocab, read_bytes, special_id
from dm_generations.text.tokenizer import PromptTokenizer, library_errors, read_pipeline

BART_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
CLIP_ENDS = ("<|startoftext|>", "<|endoftext|>")
PAIR_NAMES = re.compile(r"vocab(.*)\.json|merges(.*)\.txt")
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def bart_tokenizer(
    path: Path, vocab_size: int | None, normalize: Callable[[str], str] | None = None
) -> PromptTokenizer:
    """DALL-E mini's: BART's, whose special tokens are recognised in a text, listed by the file or not."""
    path, pipeline = _pipeline(path, _bart_pipeline)
    listed = {token.content for token in pipeline.get_added_tokens_decoder().values()}
    missing = [piece for piece in BART_SPECIALS if piece not in listed and pipeline.token_to_id(piece) is not None]
    pipeline.add_special_tokens([AddedToken(piece, lstrip=piece == "<mask>", normalized=False) for piece in missing])
    return PromptTokenizer(path, pipeline=pipeline, normalize=normalize, vocab_size=vocab_size)


def clip_tokenizer(path: Path, vocab_size: int | None) -> PromptTokenizer:
    """CLIP's: text in lower case, between the tokens of CLIP_ENDS."""
    path, pipeline = _pipeline(path, _clip_pipeline)
    return PromptTokenizer(path, pipeline=pipeline, vocab_size=vocab_size)


def vocab_and_merges(path: Path) -> tuple[Path, dict[str, int], list[tuple[str, str]]]:
    """The vocab.json's path, {piece: id} and the merges. `path`: the folder of the two files, or one of them.

    Files may share an ending, as min-dalle's `vocab_mini.json` and `merges_mini.txt` do.
    """
    found = None if path.is_dir() else PAIR_NAMES.fullmatch(path.name)
    folder, ending = (path.parent, found[1] or found[2] or "") if found else (path, "")
    vocab_path, merges_path = folder / f"vocab{ending}.json", folder / f"merges{ending}.txt"
    vocab = parse_vocab(read_bytes(vocab_path), vocab_path)
    return vocab_path, vocab, parse_merges(read_bytes(merges_path), merges_path, vocab)


def byte_pairs(path: Path, vocab: dict[str, int], merges: list[tuple[str, str]], **options: str | bool) -> models.BPE:
    """The library's byte pair model; UserError naming `path` if it refuses these files."""
    with library_errors(path, "not a vocabulary"):
        return models.BPE(vocab, merges, **options)


def _pipeline(path: Path, from_pair: Callable[[Path], Tokenizer]) -> tuple[Path, Tokenizer]:
    """A file that the tokenizer comes from, and the tokenizer; tokenizer.json counts where there are both."""
    if path.is_dir():
        json_path = path / "tokenizer.json"
        if not json_path.is_file() and not (path / "vocab.json").is_file():
            raise UserError(f"{path}: has no tokenizer.json, nor vocab.json and merges.txt, for the prompts")
        path = json_path if json_path.is_file() else path / "vocab.json"
    return path, from_pair(path) if PAIR_NAMES.fullmatch(path.name) else read_pipeline(path)


def _bart_pipeline(path: Path) -> Tokenizer:
    path, vocab, merges = vocab_and_merges(path)
    bos, eos = (special_id(vocab, piece, path) for piece in ("<s>", "</s>"))
    tokenizer = Tokenizer(byte_pairs(path, vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", eos), ("<s>", bos), add_prefix_space=False)
    return tokenizer


def _clip_pipeline(path: Path) -> Tokenizer:
    path, vocab, merges = vocab_and_merges(path)
    bos, eos = (special_id(vocab, piece, path) for piece in CLIP_ENDS)
    tokenizer = Tokenizer(byte_pairs(path, vocab, merges, end_of_word_suffix="</w>", unk_token=CLIP_ENDS[1]))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.post_processor = processors.RobertaProcessing(
        (CLIP_ENDS[1], eos), (CLIP_ENDS[0], bos), trim_offsets=False, add_prefix_space=False
    )
    # Normalised as the text is: in capitals they are still these tokens.
    tokenizer.add_special_tokens([AddedToken(piece, normalized=True) for piece in CLIP_ENDS])
    return tokenizer
