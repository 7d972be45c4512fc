"""Readable training scripts over the AutoModel microlibraries, and the automodel command."""
