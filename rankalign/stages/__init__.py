"""Resumable passes over records: sampling, scoring, and the same in shards or under Ray."""

from rankalign import moved

__getattr__ = moved(__name__)
