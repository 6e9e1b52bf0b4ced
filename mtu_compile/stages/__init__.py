"""The stages of a compilation, one file each."""
