"""Configs: the fields that exist, loading, checking, comparing."""
