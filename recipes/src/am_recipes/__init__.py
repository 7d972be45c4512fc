"""Readable training scripts over the AutoModel microlibraries, and the automodel command."""

__version__ = "0.1.0"
