"""Finds the linear projections of a model."""

from enum import StrEnum


class Role(StrEnum):
    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    OUTPUT = "output"
    GATE = "gate"
    UP = "up"
    DOWN = "down"
    OTHER = "other"
