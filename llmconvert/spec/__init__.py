"""The language specs are written in, their validation, and the registry that finds them."""
