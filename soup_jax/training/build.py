"""From a run's config to the small dataclasses that the method takes."""

from ml_collections import ConfigDict

from soup_jax.models import base as models
from soup_jax.models.base import BaseModel, ModelSettings


def model_settings(cfg: ConfigDict) -> ModelSettings:
    """What a config says to its base network."""
    return ModelSettings.from_mapping(cfg.model, vocab_size=cfg.vocab_size, seq_len=cfg.seq_len)


def base_model(cfg: ConfigDict) -> BaseModel:
    """The base network of a config.

    Raises:
      UserError: no such network, or settings that it refuses.
    """
    return models.make(cfg.model.kind, model_settings(cfg))
