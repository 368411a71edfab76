"""A base optimizer as something that can be walked ahead and taken back."""
