"""medtune: run one script, get the model configuration to deploy, with the evidence for it."""

__version__ = "0.1.0"
