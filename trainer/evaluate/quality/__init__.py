"""Scores of drawn images beside those they are meant to resemble, by the features of a local CLIP model."""
