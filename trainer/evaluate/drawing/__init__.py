"""Samples that people can use: what is drawn, by which worker, with which words in the file, on which sheets."""
