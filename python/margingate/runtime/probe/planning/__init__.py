"""From what was measured: how each operator is called while the server serves."""
