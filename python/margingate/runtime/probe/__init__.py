"""Which row counts give the same bits: measured, planned, kept to, checked on the model."""
