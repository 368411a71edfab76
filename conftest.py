"""Runs the examples of the pages as tests; those in docstrings run by --doctest-modules."""

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()], patterns=["README.md", "docs/*.md", "docs/family/*.md"]
).pytest()

# Sphinx's, and run by it.
collect_ignore = ["docs/conf.py", "docs/example_pages.py"]
collect_ignore_glob = ["docs/gallery/*", "docs/tour/*", "docs/examples/*"]
