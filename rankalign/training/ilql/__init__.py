"""Implicit language Q-learning from records with rewards."""

from rankalign import moved

__getattr__ = moved(__name__)
