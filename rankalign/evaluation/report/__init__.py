"""One page of a run, and the tables and figures on it."""

from rankalign import moved

__getattr__ = moved(__name__)
