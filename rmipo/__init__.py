"""RMiPO: preference optimisation with a margin set by response-level mutual information."""

__version__ = "0.1.0"
