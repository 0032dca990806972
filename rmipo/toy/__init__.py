"""The embedded preference world of the tiny setting: `world` makes the data, `model` what is trained, `judge` measures."""
