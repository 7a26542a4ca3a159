"""Trained runs as one web page that needs no network: what `soup-jax report` writes."""
