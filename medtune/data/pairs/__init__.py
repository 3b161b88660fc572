"""One module per data pair; see `medtune.data.registry.Pair` for what it offers."""
