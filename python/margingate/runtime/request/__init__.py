"""One request in the gate: admitted, recorded, open, held, ended; who is told."""
