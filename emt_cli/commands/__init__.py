"""The commands of `emt`, one file each."""
