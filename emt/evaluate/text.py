"""Image-text models of `transformers`: how well frames match a prompt, and embeddings of frames."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from emt.errors import EmtError, first_line


class ImageTextModel:
    """CLIP, SigLIP or any other model with `get_image_features` and `get_text_features`.

    Args:
        source: Folder or hub id.
        device: Where it runs.

    Raises:
        EmtError: It cannot be loaded, or embeds no images and texts.
    """

    def __init__(self, source: str, device: str | torch.device = "cpu") -> None:
        from transformers import AutoModel, AutoProcessor

        try:
            self.model: Any = AutoModel.from_pretrained(source).to(device).eval()
            self.processor: Any = AutoProcessor.from_pretrained(source)
        except Exception as error:  # of whatever kind: values of configurations reach deep into the library
            raise EmtError(
                f"{source} cannot be loaded as an image-text model: {first_line(error)}",
                "Give a folder or hub id such as openai/clip-vit-large-patch14.",
            ) from error
        if not hasattr(self.model, "get_image_features") or not hasattr(self.model, "get_text_features"):
            raise EmtError(
                f"{source} is a {type(self.model).__name__}, which does not embed images and texts alike.",
                "Give a model such as CLIP or SigLIP.",
            )
        self.device = device

    @torch.inference_mode()
    def embed_frames(self, frames: np.ndarray, batch: int = 32) -> Tensor:
        """Unit embeddings (frames, width) of uint8 frames (frames, height, width, 3)."""
        parts = []
        for start in range(0, len(frames), batch):
            inputs = self.processor(images=list(frames[start : start + batch]), return_tensors="pt").to(self.device)
            parts.append(_features(self.model.get_image_features(**inputs)))
        return torch.cat(parts)

    @torch.inference_mode()
    def embed_prompts(self, prompts: list[str]) -> Tensor:
        """Unit embeddings (prompts, width); long prompts are cut to what the model reads."""
        # SigLIP was trained on texts padded to the full length; CLIP does not mind.
        inputs = self.processor(text=prompts, padding="max_length", truncation=True, return_tensors="pt")
        return _features(self.model.get_text_features(**inputs.to(self.device)))


def text_alignment(frame_embeddings: Tensor, prompt_embedding: Tensor) -> float:
    """Mean cosine similarity of the frames (frames, width) with the prompt (width,), all of unit length."""
    return float((frame_embeddings @ prompt_embedding).mean())


def _features(output: Any) -> Tensor:
    # transformers 5 returns the whole output of the tower, earlier versions the projected embedding.
    embedding = output if isinstance(output, Tensor) else output.pooler_output
    return torch.nn.functional.normalize(embedding.float(), dim=-1)
