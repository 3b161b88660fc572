"""The machines a study runs on: what each tells of itself, what is wrong with it, which may take trials."""
