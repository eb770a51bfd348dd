"""Prompts to token ids, with the pipeline of a `tokenizer.json`, for BART's and CLIP's kind of model.

The pipeline (normaliser, pre-tokenizer, BPE) is run as it is by the `tokenizers` library, which gives the ids
of transformers; the ends, the cut and the padding are ours.

B: prompts   L: positions
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models

from dm_generations.errors import UserError, one_line
from dm_generations.text.rows import padded_rows


class PromptTokenizer:
    """Rows `<bos> text <eos> <pad> ...` of a fixed length, for BART's and CLIP's kind of tokenizer alike.

    folder: has the tokenizer.json; or, with `pipeline`, the file or folder that `pipeline` was made from.
    pipeline: a tokenizer of the library that is ready to use; its padding and truncation are switched off.
    normalize: applied to every text first, but not to the unconditional prompt (None).
    vocab_size: rows of the model's embedding table; None leaves ids unchecked.

    bos and eos are what the file puts around an empty text, pad is its padding's id, else that of `<pad>`, else eos
    (as CLIP pads). The ids in a DALL-E mini config.json are NOT these: they belong to the picture's tokens.
    A text that spells a special token ("</s>") gives that token if the file lists it as an added token, as in
    transformers. Raises UserError for a file that is missing, broken or lacks the ends.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        pipeline: Tokenizer | None = None,
        normalize: Callable[[str], str] | None = None,
        vocab_size: int | None = None,
    ):
        self.path = Path(folder)
        if pipeline is None:
            self.path = self.path / "tokenizer.json"
            pipeline = read_pipeline(self.path)
        self._tokenizer = pipeline
        self._normalize = normalize
        padding = self._tokenizer.padding or {}
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

        with library_errors(self.path, "cannot tokenize"):
            ends = self._tokenizer.encode("").ids
        if len(ends) != 2:
            raise UserError(f"{self.path}: puts {len(ends)} tokens around a text, expected a start and an end")
        self.bos_id, self.eos_id = ends
        pad_id = padding.get("pad_id", self._tokenizer.token_to_id("<pad>"))
        self.pad_id = self.eos_id if pad_id is None else pad_id
        self.vocab_size = vocab_size
        if vocab_size is not None and max(self.bos_id, self.eos_id, self.pad_id) >= vocab_size:
            raise UserError(
                f"{self.path}: special ids {self.bos_id}, {self.eos_id}, {self.pad_id} do not fit the model, "
                f"which has {vocab_size} tokens"
            )

    def encode(self, texts: Sequence[str | None], length: int) -> tuple[np.ndarray, np.ndarray]:
        """input_ids, attention_mask (1 up to the end token, then 0), both int32 (B, L) with L = length.

        None is the model's own unconditional prompt: the empty text, not normalised. A longer text loses its
        tail; the end token stays last. Raises UserError for a token that the model's table lacks.
        """
        if length < 2:
            raise ValueError(f"length (={length}) must leave room for the start and the end token")
        ids = [[self.bos_id, *inner, self.eos_id] for inner in self._inner_ids(texts, length)]
        return padded_rows(ids, length, self.pad_id, self.vocab_size, self.path)

    def readback(self, text: str, length: int) -> str:
        """The text that the ids of `encode([text], length)` stand for, special tokens skipped.

        CLIP's comes back in lower case, for instance, and cut where `encode` cuts it.
        """
        (ids,) = self._inner_ids([text], length)
        with library_errors(self.path, "cannot turn tokens into text"):
            text = self._tokenizer.decode(ids, skip_special_tokens=True)
        suffix = getattr(self._tokenizer.model, "end_of_word_suffix", None)
        # CLIP marks where a word ends ("cat</w>"); transformers turns the marks into spaces the same way.
        return text.replace(suffix, " ").strip() if suffix else text

    def _inner_ids(self, texts: Sequence[str | None], length: int) -> list[list[int]]:
        """Ids of each text without start and end token, at most length - 2 of them."""
        normalize = self._normalize or (lambda text: text)
        texts = ["" if text is None else normalize(well_formed(text)) for text in texts]
        return [ids[: length - 2] for ids in plain_ids(self._tokenizer, texts, self.path)]


def read_pipeline(path: Path) -> Tokenizer:
    """The library's tokenizer of a tokenizer.json. Raises UserError if it is missing or broken.

    What a file leaves to chance (merges skipped at random, for training) is switched off.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; a model folder needs its tokenizer.json")
    with library_errors(path, "not a tokenizer file"):
        pipeline = Tokenizer.from_file(str(path))
    if isinstance(pipeline.model, models.BPE):
        pipeline.model.dropout = None
    return pipeline


def plain_ids(pipeline: Tokenizer, texts: Sequence[str], path: Path) -> list[list[int]]:
    """The ids of well-formed texts, nothing put around them. Raises UserError for a file that cannot serve."""
    with library_errors(path, "cannot tokenize"):
        encodings = pipeline.encode_batch(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


@contextlib.contextmanager
def library_errors(path: Path, problem: str) -> Iterator[None]:
    """Turns whatever the `tokenizers` library makes of a bad file into "path: problem (its words)"."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # it raises the bare Exception, and its panics are not even that
        raise UserError(f"{path}: {problem} ({one_line(error)})") from error


def well_formed(text: str) -> str:
    """`text` with every lone surrogate replaced by U+FFFD and pairs of them joined; others are unchanged.

    Such strings come from broken archives and argument lists, and have no UTF-8 form to tokenize.
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
