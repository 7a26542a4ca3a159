"""Updates: one for shared parameters and router, bank optimizers for experts."""
