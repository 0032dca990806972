"""Tasks with constraints that a program verifies: an exact reward for pairs, and an exact benchmark."""
