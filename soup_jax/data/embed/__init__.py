"""Texts to unit vectors: the embedders that cut the corpus into domains and find a specialist's."""
