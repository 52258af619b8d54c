"""rankalign: align language models by ranking. See README.md; the pieces import nothing heavy until they are used."""

__version__ = "0.1.0"
