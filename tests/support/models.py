"""Which models are tested in full."""

SMALL = ("medmamba_t", "medvit_small", "resnet50", "vim_tiny", "vmamba_t")
"""One of each family, for what takes long: the larger variants are the same code with other numbers."""
