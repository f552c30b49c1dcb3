"""Reading of what the user gave: the command line's references and prompts, prompt files, and standard input."""

from emt_cli.batch.inputs.expansion import expand, preset_of, settings_of
from emt_cli.batch.inputs.prompt_files import read_table, read_text
from emt_cli.batch.inputs.warnings import PromptWarnings, syntax_warnings, unread_syntax

__all__ = [
    "PromptWarnings",
    "expand",
    "preset_of",
    "read_table",
    "read_text",
    "settings_of",
    "syntax_warnings",
    "unread_syntax",
]
