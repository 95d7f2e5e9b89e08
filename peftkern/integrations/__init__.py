"""Other libraries' formats and hooks. Nothing here imports those libraries until a function of theirs is needed."""
