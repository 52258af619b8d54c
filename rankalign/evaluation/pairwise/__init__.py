"""Two systems or more against each other: by scores, by stored reviews, by a live judge, by people."""

from rankalign import moved

__getattr__ = moved(__name__)
