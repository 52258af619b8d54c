"""PPO as one readable loop, the baseline that ranking is compared with."""

from rankalign import moved

__getattr__ = moved(__name__)
