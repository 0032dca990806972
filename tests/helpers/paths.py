"""Where things are: tests take the repository's root from here, which is a folder of links (see isolation.py)."""

import os
from pathlib import Path

from tests.helpers.isolation import CHECKOUT, LINKED

ROOT = Path(os.environ[LINKED])
SHARED_DATA = CHECKOUT.parent / "shared" / "data"  # real preference data, beside some checkouts
