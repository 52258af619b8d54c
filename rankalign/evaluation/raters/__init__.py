"""Those who grade, graded: reward models, judges, and how raters agree."""

from rankalign import moved

__getattr__ = moved(__name__)
