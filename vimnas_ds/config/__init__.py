"""One JSON file = DeepSpeed's keys + an "about" text + one "vimnas" section.

DeepSpeed ignores unknown top-level keys (`zero_optimisation` silently turns ZeRO off), so every
key is checked here, and whatever this project has not proved under test is refused with the
reason. `load_config` gives a `RunConfig` (pydantic, every field described); `deepspeed_dict` gives
what `deepspeed.initialize` gets, with the batch arithmetic done.
"""

from vimnas_ds.config.data import (
    LAYOUT_FILES,
    DataSection,
    DatasetSection,
    RandAugmentSection,
)
from vimnas_ds.config.run import (
    RunConfig,
    dataset_section,
    load_config,
    override_value,
    parse_config,
)
from vimnas_ds.config.section import ConfigError, Section
from vimnas_ds.config.training import (
    AlphaSection,
    FaultsSection,
    GuardSection,
    ModelSection,
)
from vimnas_ds.config.vimnas import VimnasSection

__all__ = [
    "LAYOUT_FILES",
    "AlphaSection",
    "ConfigError",
    "DataSection",
    "DatasetSection",
    "FaultsSection",
    "GuardSection",
    "ModelSection",
    "RandAugmentSection",
    "RunConfig",
    "Section",
    "VimnasSection",
    "dataset_section",
    "load_config",
    "override_value",
    "parse_config",
]
