"""Soup-of-Experts in JAX: pretrain once, instantiate many small specialist models.

The method is that of Ablin, Katharopoulos, Seto and Grangier, "Soup-of-Experts: Pretraining
Specialist Models via Parameters Averaging" (ICML 2025, arXiv 2502.01804). Importing this package
imports nothing else; import the module you need, for example `from soup_jax.soup import merge`.
"""

__version__ = "0.1.0"
