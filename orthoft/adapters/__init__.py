"""The adapters by name. Importing this package makes them known to PEFT."""

from orthoft.adapters.hra import HRAConfig, HRAModel
from orthoft.adapters.oftv2 import OFTv2Config, OFTv2Model
from orthoft.config import OrthoConfig
from orthoft.peft_compat import register

ADAPTERS: dict[str, type[OrthoConfig]] = {"oftv2": OFTv2Config, "hra": HRAConfig}

register("oftv2", OFTv2Config, OFTv2Model)
register("hra", HRAConfig, HRAModel)

__all__ = ["ADAPTERS", "HRAConfig", "HRAModel", "OFTv2Config", "OFTv2Model"]
