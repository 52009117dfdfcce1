"""The command-line layer: one-line errors, the paper's presets, checkpoints of every kind, and the grid."""
