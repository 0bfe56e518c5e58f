"""What the commands, benchmarks and tests need: servers, a client, a small model, checked input."""
