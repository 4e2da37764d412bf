"""The training rooms: engine, precision, blocks, adapters, optimizer, kernel, metrics, checkpoints, validation."""
