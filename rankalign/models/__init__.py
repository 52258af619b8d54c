"""What is trained: names to weights, adapters on them, and the two models that need no hub."""

from rankalign import moved

__getattr__ = moved(__name__)
