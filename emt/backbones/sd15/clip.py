"""CLIP's text encoder and its tokenizer (Radford et al. 2021, arXiv 2103.00020), as Stable Diffusion reads prompts.

They compute what `CLIPTextModel` and the tokenizers of transformers do, bit by bit; parameter names are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from torch import Tensor, nn

from emt.errors import first_line
from emt.parts import Config, Network, configured


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


#: Activations by the name that configurations give them.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": _quick_gelu, "gelu": F.gelu}


class _Embeddings(nn.Module):
    def __init__(self, words: int, positions: int, channels: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(words, channels)
        self.position_embedding = nn.Embedding(positions, channels)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        return self.token_embedding(ids) + self.position_embedding(positions)


class _Attention(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        h = F.scaled_dot_product_attention(q, k, v, is_causal=x.shape[1] > 1, scale=q.shape[-1] ** -0.5)
        return self.out_proj(h.transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    def __init__(self, channels: int, inner: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(channels, inner)
        self.fc2 = nn.Linear(inner, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class _Layer(nn.Module):
    def __init__(self, channels: int, config: Config) -> None:
        super().__init__()
        self.self_attn = _Attention(channels, config.num_attention_heads)
        self.layer_norm1 = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        self.mlp = _FeedForward(channels, config.intermediate_size, ACTIVATIONS[config.hidden_act])
        self.layer_norm2 = nn.LayerNorm(channels, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Encoder(nn.Module):
    def __init__(self, layers: Sequence[_Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class Encoding(tuple[Tensor, ...]):
    """Result of the text encoder, first of all the encoding; names are those of transformers.

    Attributes:
        last_hidden_state: (prompts, tokens, channels).
        hidden_states: the input of each layer, and the output of the last one, before the last norm.
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...]


class TextEncoder(Network):
    """CLIP's text encoder.

    Args:
        vocab_size: words.
        hidden_size: channels.
        intermediate_size: channels inside feed-forward layers.
        num_hidden_layers: layers.
        num_attention_heads: heads.
        max_position_embeddings: the largest number of tokens.
        hidden_act: a name of `ACTIVATIONS`.
        layer_norm_eps: of every norm.
    """

    @configured
    def __init__(
        self,
        vocab_size: int = 49408,
        hidden_size: int = 512,
        intermediate_size: int = 2048,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 8,
        max_position_embeddings: int = 77,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.embeddings = _Embeddings(vocab_size, max_position_embeddings, hidden_size)
        self.encoder = _Encoder([_Layer(hidden_size, self.config) for _ in range(num_hidden_layers)])
        self.final_layer_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)

    @staticmethod
    def key(name: str) -> str:
        """The name in `state_dict` of a weight in a file, which versions of transformers prefix."""
        return name.removeprefix("text_model.")

    @property
    def text_model(self) -> TextEncoder:
        """The encoder itself, where some versions of transformers have it."""
        return self

    def get_input_embeddings(self) -> nn.Embedding:
        """Embeddings of words."""
        return self.embeddings.token_embedding

    def set_input_embeddings(self, table: nn.Embedding) -> None:
        """Put other embeddings of words in their place."""
        self.embeddings.token_embedding = table

    def forward(self, ids: Tensor, **options: Any) -> Encoding:
        """Encode token ids (prompts, tokens); the hidden states are there in any case.

        Raises:
            IndexError: there are more tokens than positions, or an id is of no word.
        """
        states = [self.embeddings(ids)]
        for layer in self.encoder.layers:
            states.append(layer(states[-1]))
        found = Encoding((self.final_layer_norm(states[-1]),))
        found.last_hidden_state, found.hidden_states = found[0], tuple(states)
        return found


class Tokenizer:
    """A tokenizer of a model folder, as far as prompts need it; the result has the names that transformers gives it.

    Args:
        backend_tokenizer: of the library `tokenizers`.
        model_max_length: tokens that the network reads.
        pad: the token that fills up.
    """

    #: Classes of transformers that are this tokenizer, for files that they saved.
    CLASSES: ClassVar = ("CLIPTokenizer", "CLIPTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")

    def __init__(self, backend_tokenizer: Backend, model_max_length: int, pad: str) -> None:
        self.backend_tokenizer, self.model_max_length, self.pad_token = backend_tokenizer, model_max_length, pad
        self.pad_token_id = backend_tokenizer.token_to_id(pad)

    @classmethod
    def read(cls, folder: Path) -> Tokenizer:
        """That of a folder with `tokenizer.json`.

        Raises:
            OSError: a file is missing.
            ValueError: its configuration is of another kind, or a file is damaged.
        """
        config = Config.read(folder / "tokenizer_config.json")
        try:
            backend = Backend.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises nothing narrower
            raise ValueError(f"{folder / 'tokenizer.json'} is damaged: {first_line(error)}") from None
        pad, length = config.get("pad_token"), config.get("model_max_length")
        pad = pad.get("content") if isinstance(pad, dict) else pad
        if not isinstance(pad, str) or backend.token_to_id(pad) is None or type(length) is not int or length < 3:
            raise ValueError(f"{folder} has no token that fills up (pad_token), or no number of tokens")
        return cls(backend, length, pad)

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size()

    def add_tokens(self, words: Sequence[str | AddedToken]) -> int:
        """Add words that are read as they are; returns how many were new."""
        return self.backend_tokenizer.add_tokens(list(words))

    def convert_tokens_to_ids(self, words: Sequence[str]) -> list[int]:
        """Numbers of tokens.

        Raises:
            KeyError: there is no such token.
        """
        known = self.get_vocab()
        return [known[word] for word in words]

    def get_vocab(self) -> dict[str, int]:
        """All tokens, and their numbers."""
        return self.backend_tokenizer.get_vocab()

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: str | bool = False,
        max_length: int | None = None,
        truncation: bool = False,
        return_tensors: str | None = None,
        **options: Any,
    ) -> Any:
        """Token ids of a text, or of each of several, as `input_ids`.

        Args:
            text: or texts.
            padding: `"max_length"` fills up to `max_length`.
            max_length: tokens; by default those that the network reads.
            truncation: drop tokens beyond it.
            return_tensors: `"pt"` for a tensor.
            options: of no effect.
        """
        backend, limit = self.backend_tokenizer, max_length or self.model_max_length
        if truncation:
            backend.enable_truncation(limit)
        else:
            backend.no_truncation()
        if padding == "max_length":
            backend.enable_padding(length=limit, pad_id=self.pad_token_id, pad_token=self.pad_token)
        else:
            backend.no_padding()
        one = isinstance(text, str)
        encoded = backend.encode_batch([text] if isinstance(text, str) else list(text))
        rows = [encoding.ids for encoding in encoded]
        mask = [encoding.attention_mask for encoding in encoded]
        if return_tensors == "pt":
            return SimpleNamespace(input_ids=torch.tensor(rows), attention_mask=torch.tensor(mask))
        return SimpleNamespace(input_ids=rows[0] if one else rows, attention_mask=mask[0] if one else mask)
