"""The tables of patches, and functions that hand over from SGLang."""
