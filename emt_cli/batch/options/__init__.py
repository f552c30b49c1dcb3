"""Every option of the batch commands, declared once: type, range, unit and help.

The command line, job files and `emt rerun` all read the same declarations: `emt_cli.commands.arguments.takes_options`
turns them into a command's parameters, `parse_field` checks one value of a JSON Lines or CSV job against them.
"""

from emt_cli.batch.options.declarations import Field, UsageError, usage_errors
from emt_cli.batch.options.fields import (
    JOB_FIELDS,
    MAX_SEED,
    SETTING_NAMES,
    TEXT_FIELDS,
    check_sound,
    check_together,
    field_name,
    parse_defaults,
    parse_field,
    parse_seeds,
    unknown_field,
)
from emt_cli.batch.options.settings import (
    ALL_FRAMES,
    MAX_SIDE,
    REFERENCE_SIZE,
    Audio,
    Fit,
    Format,
    Method,
    PromptSyntax,
    Scheduler,
    Settings,
)
from emt_cli.batch.options.transfer import (
    Kernels,
    Memory,
    Precision,
    TransferOptions,
    check_device,
    parse_batch_size,
    parse_gpus,
)

__all__ = [
    "ALL_FRAMES",
    "JOB_FIELDS",
    "MAX_SEED",
    "MAX_SIDE",
    "REFERENCE_SIZE",
    "SETTING_NAMES",
    "TEXT_FIELDS",
    "Audio",
    "Field",
    "Fit",
    "Format",
    "Kernels",
    "Memory",
    "Method",
    "Precision",
    "PromptSyntax",
    "Scheduler",
    "Settings",
    "TransferOptions",
    "UsageError",
    "check_device",
    "check_sound",
    "check_together",
    "field_name",
    "parse_batch_size",
    "parse_defaults",
    "parse_field",
    "parse_gpus",
    "parse_seeds",
    "unknown_field",
    "usage_errors",
]
