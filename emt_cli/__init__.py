"""The `emt` program."""
