"""Files: adapters, checkpoints, and the formats that other libraries read."""
