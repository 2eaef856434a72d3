"""Stands in for Transformers' generation suite, which its source distribution leaves out."""


class GenerationTesterMixin:
    pass
