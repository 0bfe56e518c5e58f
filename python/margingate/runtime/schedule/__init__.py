"""SGLang's loop with the gate in it: results, next batch, admission, prefix cache, stream."""
