"""CLIP's tokenizer: lower case, byte pairs within words, between a start and an end token."""

from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, normalizers, pre_tokenizers, processors

from dm_generations.models.tokenization import (
    PromptTokenizer,
    build_bpe,
    find_token_id,
    read_pipeline,
    read_vocab_and_merges,
)

START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def load_clip_tokenizer(path: Path, vocab_size: int | None) -> PromptTokenizer:
    """Load the tokenizer of a CLIP model.

    Args:
        path: A folder with tokenizer.json or vocab.json and merges.txt, or one of these files.
        vocab_size: Rows of the model's text embedding. None leaves ids unchecked.

    Raises:
        UserError: A file is missing or broken.
    """
    path, pipeline = read_pipeline(path, _build_pipeline)
    return PromptTokenizer(path, pipeline=pipeline, vocab_size=vocab_size)


def _build_pipeline(path: Path) -> tokenizers.Tokenizer:
    """Build what transformers makes of vocab.json and merges.txt (`convert_slow_tokenizer`)."""
    path, vocab, merges = read_vocab_and_merges(path)
    start_id, end_id = (find_token_id(vocab, token, path) for token in (START, END))
    pipeline = tokenizers.Tokenizer(build_bpe(path, vocab, merges, end_of_word_suffix="</w>", unk_token=END))
    pipeline.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    pipeline.decoder = decoders.ByteLevel()
    pipeline.post_processor = processors.RobertaProcessing(
        (END, end_id), (START, start_id), trim_offsets=False, add_prefix_space=False
    )
    # Normalized as the text is: in capitals they are still these tokens.
    pipeline.add_special_tokens([tokenizers.AddedToken(token, normalized=True) for token in (START, END)])
    return pipeline
