"""SGLang's server arguments, its environment and fields of its requests: read, and looked at."""
