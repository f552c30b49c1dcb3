"""The network as a model of diffusers, which that opens, saves and trains."""

from __future__ import annotations

from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin

from emt.backbones.sd15.network import MotionTransferNetwork


class MotionTransferUNet(ModelMixin, MotionTransferNetwork, ConfigMixin):
    """`MotionTransferNetwork` with what diffusers' models have: `from_pretrained`, `save_pretrained` and the like."""

    _supports_gradient_checkpointing = True
    __init__ = MotionTransferNetwork.__init__
    # The configuration is diffusers' own, although the network comes first: modules have to look up attributes before
    # configurations do.
    config = ConfigMixin.config
    register_to_config = ConfigMixin.register_to_config
    from_config = ConfigMixin.__dict__["from_config"]


# `model_index.json` names this module; folders saved before and after a move of the code agree.
MotionTransferUNet.__module__ = "emt.unet"
