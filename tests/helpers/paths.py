"""Where things are: every test takes the repository's root from here."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
SHARED_DATA = ROOT.parent / "shared" / "data"  # real preference data, beside some checkouts
