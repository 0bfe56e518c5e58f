"""What is measured of a model: whatever has a row axis, and how a forward calls it."""
