"""The module that `model_index.json` names for the network of Stable Diffusion 1.5.

diffusers looks up both names in the module that a folder names: the class itself, and `ModelMixin`, by which it
decides how to load it. Folders keep naming this module, wherever the network's code is.
"""

from diffusers.models.modeling_utils import ModelMixin

from emt.backbones.sd15.unet import MotionTransferUNet

__all__ = ["ModelMixin", "MotionTransferUNet"]
