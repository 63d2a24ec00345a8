"""Word-level text encoder with the interface of Open-Sora's T5 (opensora/models/text_encoder/t5.py), without weights.

Every word owns a fixed pseudo-random vector. The words of the demo's captions are listed in `VOCABULARY`. Any other word is
hashed into one of `NUM_BUCKETS` vectors, so that captions of a user's own clips work too. Like T5 the encoder closes a text
with an end token and pads to `model_max_length`; unlike T5 a vector does not depend on its neighbours.
"""

import re
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

PAD, END = 0, 1
VOCABULARY = (
    "a", "an", "the", "and", "on", "in", "of", "is", "with", "to", "background", "dark", "plain", "video", "clip",
    "red", "green", "blue", "yellow", "purple", "white", "cyan", "orange", "pink", "gray", "black",
    "circle", "square", "triangle", "disc", "ball", "box", "star", "cross",
    "moving", "move", "moves", "left", "right", "up", "down", "bouncing", "still", "slowly", "fast", "small", "large",
    "big",
)  # fmt: skip
NUM_BUCKETS = 512
_WORD_ID = {word: 2 + index for index, word in enumerate(VOCABULARY)}


class TinyTextEncoder:
    """Texts -> word vectors and token mask, in the shapes the host's models expect.

    Args:
        model_max_length: L, tokens per text; longer texts are cut, the end token stays.
        output_dim: D, size of a word vector; its entries are standard normal.
        device, dtype: Where and as what the vectors are given out. The host passes both.
        seed: Of the word vectors. Teacher and student must use one and the same.

    Raises:
        ValueError: model_max_length < 2 or output_dim < 1.
    """

    def __init__(
        self,
        model_max_length: int = 10,
        output_dim: int = 32,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        if model_max_length < 2 or output_dim < 1:
            raise ValueError(
                f"model_max_length >= 2 (a word and the end token) and output_dim >= 1 are needed, got "
                f"{model_max_length} and {output_dim}; the demo's teacher uses 10 and 32"
            )
        self.model_max_length = model_max_length
        self.output_dim = output_dim
        self.device = torch.device(device)
        self.dtype = dtype
        self.y_embedder: nn.Module | None = None  # the host's scripts put the model's own here, for `null`
        # RandomState's stream is frozen by numpy's policy, and is untouched by (and does not touch) any global seed
        rows = np.random.RandomState(seed).standard_normal((2 + len(VOCABULARY) + NUM_BUCKETS, output_dim))
        rows[PAD] = 0.0
        self._table = torch.from_numpy(rows).to(self.device, dtype)

    def tokenize_fn(self, text: str | Sequence[str]) -> dict[str, Tensor]:
        """Texts -> dict(input_ids, attention_mask), both int64 [B, L] on the CPU; one str counts as a batch of one."""
        texts = [text] if isinstance(text, str) else list(text)
        input_ids = torch.full((len(texts), self.model_max_length), PAD, dtype=torch.int64)
        for row, words in enumerate(re.findall(r"[^\W_]+", one.lower()) for one in texts):
            ids = [_word_id(word) for word in words[: self.model_max_length - 1]] + [END]
            input_ids[row, : len(ids)] = torch.tensor(ids)
        return {"input_ids": input_ids, "attention_mask": (input_ids != PAD).long()}

    def encode(
        self,
        text: Sequence[str] | None = None,
        attention_mask: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Word vectors of a batch, in either of the host's call styles.

        v1.0-1.2 call `encode(list_of_texts)`, v1.3 `encode(**tokenize_fn(texts))` or `encode(ids, attention_mask=...)`.

        Args:
            text: Texts (list of str), or in v1.3's positional style the ids themselves.
            attention_mask: int64 [B, L], only with ids; None means every token that is not padding.
            input_ids: int64 [B, L] from `tokenize_fn`.

        Returns:
            dict(y=[B, 1, L, D], mask=int64 [B, L] with 1 on words and on the end token, 0 on padding).

        Raises:
            ValueError: neither or both of texts and ids, a mask with texts, or ids outside the table.
        """
        if isinstance(text, Tensor) and input_ids is None:
            text, input_ids = None, text
        if (text is None) == (input_ids is None):
            raise ValueError(
                f"encode takes either texts or input_ids, got text={text!r} and input_ids="
                f"{'a tensor' if input_ids is not None else None}; pass exactly one of them"
            )
        if text is not None:
            if attention_mask is not None:
                raise ValueError("encode got texts and an attention_mask; texts make their own mask, leave it out")
            tokens = self.tokenize_fn(text)
            input_ids, attention_mask = tokens["input_ids"], tokens["attention_mask"]
        input_ids = input_ids.to(self.device)
        if input_ids.numel() and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < len(self._table):
            raise ValueError(
                f"input_ids must lie in 0..{len(self._table) - 1}, got {int(input_ids.min())}..{int(input_ids.max())}; "
                "make them with this encoder's tokenize_fn"
            )
        if attention_mask is None:
            attention_mask = (input_ids != PAD).long()
        return {"y": self._table[input_ids][:, None], "mask": attention_mask.to(self.device)}

    def null(self, n: int) -> Tensor:
        """The model's null text for n samples, [n, 1, L, D].

        Raises:
            ValueError: the model's y_embedder was not attached.
        """
        if self.y_embedder is None:
            raise ValueError(
                "null text belongs to the model, but this encoder's y_embedder is None; set "
                "`text_encoder.y_embedder = model.y_embedder` first, as the host's scripts do"
            )
        return self.y_embedder.y_embedding[None].repeat(n, 1, 1)[:, None]


def _word_id(word: str) -> int:
    # crc32, not hash(): Python salts hash() anew in every process
    return _WORD_ID.get(word, 2 + len(VOCABULARY) + zlib.crc32(word.encode()) % NUM_BUCKETS)
