"""The model card of an export: README.md, with the metadata that model hubs read."""

import pathlib
from collections.abc import Mapping
from typing import Any

from soup_jax import tree
from soup_jax.specialists.export.llama import Llama

_NUM_DOMAINS = 5
_TEXT = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- soup-of-experts
- soup_jax
---

# From the soup {name}

A causal language model of {millions:.3g}M parameters in {dtype}, of the Llama architecture. It is
{what} (Ablin et al., ICML 2025, arXiv 2502.01804), made by soup_jax.
A specialist is shared parameters plus experts, weighted for a distribution over domains of text,
without further training.

- Run: {run}, step {step}; config {config}, corpus {corpus} (SHA-256).
- Domain weights from {documents}. The heaviest of {num_domains} domains, which are clusters of the
  corpus, labelled by typical words or by the names that its documents give them:
{domains}
- Trained on windows of {seq_len} tokens; longer texts were never seen.{one_document}
- `recipe.json` has all domain weights and coefficients.

## Load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0], skip_special_tokens=True))
```

**How a prompt begins.** In training every window starts after the end-of-text token `{eos}` (id
{eos_id}). The tokenizer puts it before every text; where you give ids of your own, put it first. It
is also what ends a generated text. Its characters inside a text are encoded as ordinary text. There
is no padding token: set one to batch, such as `tokenizer.pad_token = tokenizer.eos_token`. There is
no chat template, for this is no chat model.

## Licence

None is stated here. The parameters come from the texts that they were trained on, so the terms of
these texts, and of the checkpoint that training started from, if it did, decide what may be done
with the model.
"""


def text(recipe: Mapping[str, Any], model: Llama, *, eos: str) -> str:
    """The card of a specialist whose end-of-text token is `eos`."""
    heaviest = sorted(zip(recipe["h"], recipe.get("domains", ())), key=lambda pair: -pair[0])
    number = recipe.get("num_documents", 0)
    one_document = ""
    if model.settings.attention_reset >= 0:
        one_document = (
            "\n- In training attention saw nothing before an end-of-text token, and here it does: "
            "give one document at a time."
        )
    what = "one merge of a Soup-of-Experts"
    if recipe["alpha"] and not any(recipe["alpha"]):
        what = "the shared parameters, without experts, of a Soup-of-Experts"
    return _TEXT.format(
        what=what,
        name=recipe.get("name") or "a run",
        millions=tree.num_params(model.leaves) / 1e6,
        dtype=model.dtype,
        run=pathlib.PurePath(recipe.get("run", "")).name or "unknown",
        step=recipe.get("step", "unknown"),
        config=recipe["hashes"].get("config", "unknown")[:12],
        corpus=recipe["hashes"].get("corpus", "unknown")[:12],
        documents=f"{number} documents" if number else "no documents, but given",
        num_domains=len(recipe["h"]),
        domains="\n".join(f"  - {w:.1%} {label}" for w, label in heaviest[:_NUM_DOMAINS]),
        seq_len=model.settings.seq_len,
        one_document=one_document,
        eos=eos,
        eos_id=model.eos_id,
    )
