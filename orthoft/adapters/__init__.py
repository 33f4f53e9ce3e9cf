"""The adapters by name. Importing this package makes them known to PEFT."""

from orthoft.adapters.goft import GOFTConfig, GOFTModel
from orthoft.adapters.hra import HRAConfig, HRAModel
from orthoft.adapters.oftv2 import OFTv2Config, OFTv2Model
from orthoft.adapters.psoft import PSOFTConfig, PSOFTModel
from orthoft.adapters.svft import SVFTConfig, SVFTModel
from orthoft.config import OrthoConfig
from orthoft.peft_compat import register
from orthoft.tuner import OrthoModel

_METHODS: tuple[tuple[type[OrthoConfig], type[OrthoModel]], ...] = (
    (OFTv2Config, OFTv2Model),
    (HRAConfig, HRAModel),
    (GOFTConfig, GOFTModel),
    (PSOFTConfig, PSOFTModel),
    (SVFTConfig, SVFTModel),
)

ADAPTERS: dict[str, type[OrthoConfig]] = {config.method: config for config, _ in _METHODS}

for _config, _model in _METHODS:
    register(_config.method, _config, _model)

__all__ = [
    "ADAPTERS",
    "GOFTConfig",
    "GOFTModel",
    "HRAConfig",
    "HRAModel",
    "OFTv2Config",
    "OFTv2Model",
    "PSOFTConfig",
    "PSOFTModel",
    "SVFTConfig",
    "SVFTModel",
]
