"""The method: bank, router, merge, gradients in factored form, layout on the mesh.

It knows nothing of configs, data or training loops: `init`, `value_and_grad` and `specialist` work
for any network that is a `soup_jax.models.base.BaseModel`.
"""

from soup_jax.soup.gradients import Batch, SoupGrads, squared_norms, value_and_grad
from soup_jax.soup.parameters import SoupConfig, coefficients, init, specialist

__all__ = [
    "Batch",
    "SoupConfig",
    "SoupGrads",
    "coefficients",
    "init",
    "specialist",
    "squared_norms",
    "value_and_grad",
]
