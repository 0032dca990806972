"""Where each objective comes from, for model cards: read from papers.yaml."""

from pathlib import Path
from typing import NamedTuple

import yaml


class Paper(NamedTuple):
    name: str  # of the method, as its authors write it
    title: str
    arxiv: str
    authors: str  # as BibTeX takes them

    @property
    def citation(self) -> str:
        """A BibTeX entry."""
        key = self.name.lower().replace("-", "")
        return (
            f"@article{{{key},\n  title  = {{{self.title}}},\n  author = {{{self.authors}}},\n"
            f"  journal = {{arXiv preprint arXiv:{self.arxiv}}}\n}}"
        )


FILE = Path(__file__).with_suffix(".yaml")
PAPERS = {method: Paper(**paper) for method, paper in yaml.safe_load(FILE.read_text("utf-8")).items()}
