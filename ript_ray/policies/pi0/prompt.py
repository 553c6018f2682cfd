"""Words to tokens as π0 and π0.5 read them."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from ript_ray.errors import UserError

FILES = ("tokenizer.model", "tokenizer.json")
"""SentencePiece's format, as openpi uses it, and that of the ``tokenizers`` library."""


class PromptTokenizer:
    """PaliGemma's tokeniser, or another one of its kind, with the content of its file.

    Args:
        file: one of `FILES`, which says the format.
        content: of the file.
    """

    def __init__(self, file: str, content: bytes) -> None:
        self.file, self.content = file, content
        self.size: int
        """Tokens that it knows."""
        self._begin: int
        self._tokens: Callable[[str], list[int]]
        if file == FILES[0]:
            from sentencepiece import SentencePieceProcessor

            pieces = SentencePieceProcessor(model_proto=content)
            self._tokens, self._begin, self.size = pieces.encode, pieces.bos_id(), len(pieces)
        else:
            from tokenizers import Tokenizer

            words = Tokenizer.from_buffer(content)
            words.no_padding()  # the file may ask for either
            words.no_truncation()
            self.size = words.get_vocab_size(with_added_tokens=False)
            # Without its own rule for the beginning, which would come to what `encode` adds.
            self._tokens = lambda text: list(words.encode(text, add_special_tokens=False).ids)
            begin = words.token_to_id("<bos>")
            if begin is None:
                raise ValueError("it has no <bos>")
            self._begin = begin

    @classmethod
    def load(cls, path: Path) -> PromptTokenizer:
        """Read ``tokenizer.model`` (or any ``.model``) or ``tokenizer.json``, or the one of them in a folder.

        Raises:
            UserError: when there is none, or it cannot be read.
        """
        candidates = [path / name for name in FILES] if path.is_dir() else [path]
        for candidate in candidates:
            if candidate.is_file():
                try:
                    return cls(FILES[candidate.suffix == ".json"], candidate.read_bytes())
                except Exception as error:  # the libraries raise bare exceptions
                    raise UserError(f"{candidate} is no tokeniser ({error}); expected {' or '.join(FILES)}") from error
        raise UserError(
            f"no tokeniser at {path}; expected {' or '.join(FILES)}: openpi's is paligemma_tokenizer.model of "
            "gs://big_vision; copy it there, or set convert.tokenizer"
        )

    @classmethod
    def train(cls, sentences: Iterable[str], size: int) -> PromptTokenizer:
        """A small one of PaliGemma's kind (byte-pair encoding with bytes to fall back on, a token for the new line).

        Args:
            sentences: to learn from.
            size: tokens at most, more than 300.
        """
        import sentencepiece

        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=size,
            hard_vocab_limit=False,
            byte_fallback=True,
            add_dummy_prefix=False,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            user_defined_symbols=["\n"],
            pad_id=0,
            eos_id=1,
            bos_id=2,
            unk_id=3,
            minloglevel=2,
        )
        return cls(FILES[0], model.getvalue())

    def encode(self, text: str, begin: bool = True) -> list[int]:
        """Tokens of a text; with ``begin`` the one that begins a text comes first, once."""
        return [self._begin] * begin + self._tokens(text)

    def to_json(self) -> dict[str, str]:
        """Plain values for a JSON file."""
        return {"file": self.file, "content": base64.b64encode(self.content).decode()}

    @classmethod
    def from_json(cls, values: Mapping[str, str]) -> PromptTokenizer:
        """The inverse of `to_json`."""
        return cls(values["file"], base64.b64decode(values["content"]))

    def __reduce__(self) -> tuple[type[PromptTokenizer], tuple[str, bytes]]:
        return PromptTokenizer, (self.file, self.content)


def prompt_tokens(
    tokenizer: PromptTokenizer,
    instruction: str,
    state: np.ndarray | None = None,
    advantage: str | None = None,
    limit: int = 48,
) -> list[int]:
    """Tokens of a prompt as openpi's ``tokenizer.py`` makes them.

    Args:
        tokenizer: of the checkpoint.
        instruction: as the environment gives it.
        state: the normalised state, float[S], which π0.5 reads as words: 256 bins over [−1, 1].
        advantage: said behind the instruction, if given.
        limit: longer prompts are cut, with a warning.
    """
    text = instruction.strip().replace("_", " ").replace("\n", " ")
    if advantage is not None:
        text = f"{text}, Advantage: {advantage}"
    if state is None:
        tokens = tokenizer.encode(text) + tokenizer.encode("\n", begin=False)
    else:
        bins = np.digitize(state, np.linspace(-1, 1, 257)[:-1]) - 1
        tokens = tokenizer.encode(f"Task: {text}, State: {' '.join(map(str, bins))};\nAction: ")
    if len(tokens) > limit:
        warnings.warn(f"a prompt of {len(tokens)} tokens is cut to {limit}: {text!r}", stacklevel=2)
    return tokens[:limit]


def pad(rows: Sequence[list[int]], least: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows of tokens, zeros behind: int64[B, longest, or ``least`` if that is more]; and where they are valid, bool, or
    None when all are of themselves.
    """
    longest = max(least, *map(len, rows))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    if not least and all(len(row) == longest for row in rows):
        return tokens, None
    return tokens, torch.tensor([[i < len(row) for i in range(longest)] for row in rows])
