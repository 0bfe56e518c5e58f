"""Everything that touches SGLang. A new SGLang version changes this package alone."""
