"""The embedded preference world of the tiny setting: `world` makes data, `files` what is trained, `judge` measures."""
