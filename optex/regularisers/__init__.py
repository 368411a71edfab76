"""Loss terms of the family; a paper a file."""

__all__ = ["REGULARISERS"]

# What `optex list` says of each.
REGULARISERS: dict[str, str] = {}
