"""The embedded preference world of the tiny setting: `world` makes data, `model` what is trained, `judge` measures."""
