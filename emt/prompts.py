"""Encodings of prompts, kept on disk: the text encoder is larger than the network, and runs once a prompt.

Where all prompts are known, the encoder is not opened at all. Where it is, it is gone before the network comes.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import html
import json
import logging
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from emt.cache import ContentIndex, default_dir
from emt.checkpoints import check_loaded
from emt.errors import EmtError, first_line
from emt.remote import MissingError, child, copy, put, shown
from emt.storage import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

logger = logging.getLogger(__name__)

#: Tokens that the network reads; those after a prompt's own are zero.
TOKENS = 512
#: Bytes that all encodings on disk may take: some 5,000 prompts.
LIMIT = 2_000_000_000


def cleaned(prompt: str) -> str:
    """A prompt as the captions were that Wan was trained on: repaired text, no markup, single spaces."""
    import ftfy  # only where prompts are cleaned: models with their own words do without

    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


@torch.no_grad()
def encode_prompts(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, encoder: UMT5EncoderModel, tokens: int = TOKENS
) -> list[Tensor]:
    """Encodings of prompts, each of its own tokens: (tokens of the prompt, width), on the CPU.

    Args:
        prompts: as given; they are cleaned here.
        tokenizer: of the encoder.
        encoder: on the device to compute on.
        tokens: most of a prompt; what is longer is cut, with a warning.
    """
    encodings = []
    for prompt in prompts:
        ids = tokenizer(cleaned(prompt), verbose=False).input_ids
        if len(ids) > tokens:
            logger.warning("the prompt has %d tokens, the model reads the first %d: %s…", len(ids), tokens, prompt[:60])
        given = tokenizer(cleaned(prompt), max_length=tokens, truncation=True, return_tensors="pt")
        hidden = encoder(given.input_ids.to(encoder.device), given.attention_mask.to(encoder.device)).last_hidden_state
        encodings.append(hidden[0].cpu())
    return encodings


def padded(encodings: Sequence[Tensor], tokens: int = TOKENS) -> Tensor:
    """Encodings side by side, followed by zeros: (prompts, tokens, width)."""
    batch = encodings[0].new_zeros(len(encodings), tokens, encodings[0].shape[1])
    for row, encoding in zip(batch, encodings, strict=True):
        row[: len(encoding)] = encoding
    return batch


class PromptEncoder:
    """Encodes prompts with the text encoder of a model folder, or takes them from disk.

    Args:
        model: model folder, with `text_encoder` and `tokenizer`.
        cache: folder for encodings; None keeps them for this process only.
        index: hashes of files: encodings of another text encoder or tokenizer are not taken.
        tokens: that the network reads.
        shared: URL of a folder of encodings behind that of this machine, which other machines read and write; empty for
            none. Where it fails, the run goes on without, after one warning.
    """

    def __init__(
        self, model: Path, cache: Path | None, index: ContentIndex, tokens: int = TOKENS, shared: str = ""
    ) -> None:
        self.model, self.cache, self.index, self.tokens, self.shared = model, cache, index, tokens, shared
        self._known: dict[str, Tensor] = {}

    @classmethod
    def of_model(
        cls, model: str | Path, caches: Path | None = None, shared: str = "", **download: Any
    ) -> PromptEncoder:
        """The encoder of a model folder or hub id, which keeps encodings below `caches`, by default the user's.

        Args:
            model: folder or hub id.
            caches: folder of the caches.
            shared: URL of a folder of caches that machines share.
            download: options of `huggingface_hub.snapshot_download`.
        """
        folder, caches = Path(model), caches or default_dir()
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(
                snapshot_download(str(model), allow_patterns=["*.json", "text_encoder/*", "tokenizer/*"], **download)
            )
        return cls(folder, caches / "prompts", ContentIndex(caches), shared=child(shared, "prompts") if shared else "")

    @functools.cached_property
    def digest(self) -> str:
        """Hash of the text encoder and the tokenizer."""
        parts = [self.index.sha256(self.model / name) for name in ("text_encoder", "tokenizer")]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    @functools.cached_property
    def width(self) -> int:
        """Numbers that the text encoder has for a token."""
        return int(json.loads((self.model / "text_encoder" / "config.json").read_bytes())["d_model"])

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Encodings of prompts, padded: (prompts, tokens, width), on the CPU.

        What is not known is encoded on the CPU: the network has the GPU.

        Raises:
            EmtError: if the text encoder cannot be opened.
        """
        self.encode(prompts, "cpu")
        return padded([self._known[self._key(prompt)] for prompt in prompts], self.tokens)

    def encode(self, prompts: Iterable[str], device: torch.device | str) -> int:
        """Encode prompts that are not known yet on a device, and leave it as it was; returns how many there were.

        Before the network is opened, that is the GPU.

        Raises:
            EmtError: if the text encoder cannot be opened.
        """
        missing = [prompt for prompt in dict.fromkeys(prompts) if self._find(prompt) is None]
        if missing:
            self._encode(missing, device)
        return len(missing)

    def _key(self, prompt: str) -> str:
        content = json.dumps([1, self.digest, self.tokens, cleaned(prompt)])
        return hashlib.sha256(content.encode("utf-8", "backslashreplace")).hexdigest()

    def _find(self, prompt: str) -> Tensor | None:
        key = self._key(prompt)
        if key not in self._known and self.cache is not None:
            path = self.cache / f"{key}.safetensors"
            if self.shared and not path.exists():
                self._fetch(path)
            try:
                self._known[key] = self._load(path, key)
            except FileNotFoundError:
                return None
            except Exception:  # whatever is wrong with it, it can be made again
                with suppress(OSError):
                    path.unlink()
                return None
            with suppress(OSError):
                os.utime(path)  # its time of use, by which the oldest are dropped
        return self._known.get(key)

    def _load(self, path: Path, key: str) -> Tensor:
        """The encoding in a file.

        Raises:
            ValueError: it is of another prompt or encoder, or no encoding that the network takes.
        """
        with safe_open(path, framework="pt") as file:
            encoding: Tensor = file.get_tensor("encoding")
            if (file.metadata() or {}).get("key") != key:
                raise ValueError("it is of another prompt")
        if encoding.ndim != 2 or not 1 <= len(encoding) <= self.tokens or encoding.shape[1] != self.width:
            raise ValueError(f"it has the shape {tuple(encoding.shape)}")
        if not encoding.isfinite().all():
            raise ValueError("it is not finite")
        return encoding

    def _encode(self, prompts: Sequence[str], device: torch.device | str) -> None:
        from transformers import AutoTokenizer, UMT5EncoderModel

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(self.model / "tokenizer"), local_files_only=True)
            encoder: Any = UMT5EncoderModel.from_pretrained(
                str(self.model / "text_encoder"), local_files_only=True, dtype="auto"
            )
        except Exception as error:  # of whatever kind: values of configurations reach deep into the library
            raise EmtError(
                f"the text encoder of {self.model} cannot be opened: {first_line(error)}", "Import the model again."
            ) from error
        check_loaded({"text_encoder": encoder}, self.model)
        encoder.to(device).eval()
        for prompt in prompts:  # one by one, so that what is done when something happens stays done
            encoding = encode_prompts([prompt], tokenizer, encoder, self.tokens)[0]
            self._known[self._key(prompt)] = encoding
            self._keep(self._key(prompt), encoding)
        del encoder
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _keep(self, key: str, encoding: Tensor) -> None:
        if self.cache is None:
            return
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            write_atomically(self.cache / f"{key}.safetensors", save({"encoding": encoding.contiguous()}, {"key": key}))
            if self.shared:
                put(self.cache / f"{key}.safetensors", child(self.shared, f"{key}.safetensors"))
            self._drop_oldest(self.cache)
        except OSError as error:
            logger.warning("the encoding of a prompt is not kept in %s: %s", self.cache, error.strerror)
        except EmtError as error:
            self._go_without(error)

    def _fetch(self, path: Path) -> None:
        """Copy an encoding of the store to this machine, if it is there."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            copy(child(self.shared, path.name), path)
        except MissingError:
            pass
        except (EmtError, OSError) as error:
            self._go_without(error)

    def _go_without(self, error: EmtError | OSError) -> None:
        reason = error.problem if isinstance(error, EmtError) else error.strerror
        logger.warning("encodings of prompts are not shared in %s: %s", shown(self.shared), reason)
        self.shared = ""

    @staticmethod
    def _drop_oldest(cache: Path) -> None:
        """Remove the encodings that were not used for longest, as long as all together are too large."""
        entries = sorted((status.st_mtime, status.st_size, e.path) for e in os.scandir(cache) if (status := e.stat()))
        excess = sum(size for _, size, _ in entries) - LIMIT
        for _, size, path in entries:
            if excess <= 0:
                break
            os.unlink(path)
            excess -= size
