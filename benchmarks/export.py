"""Does a specialist in transformers have our logits and greedy texts, on real text?

    python benchmarks/export.py --model=SPECIALIST --texts=FILES [--num=20] [--tokens=32]

Exports the specialist in float32 into a temporary folder, loads it with AutoTokenizer and
AutoModelForCausalLM on the CPU, and goes through some documents of a file, folder or glob, evenly
spread over them: token ids, logits of up to `seq_len` tokens, and a greedy continuation of the
first eighth of these. It needs `pip install 'soup_jax[hf]'`, and prints one line of figures; the
exit status is 1 if ids or continuations differ anywhere, or logits by 1e-4.
"""

import argparse
import os
import pathlib
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import torch
import transformers

from soup_jax.evaluation.sample import read_sample
from soup_jax.specialists.generate import generate_ids
from soup_jax.specialists.specialist import Specialist


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", required=True)
    parser.add_argument("--num", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=32, help="greedy tokens a text")
    args = parser.parse_args()

    ours = Specialist.load(args.model)
    seq_len, eos_id = ours.recipe["seq_len"], ours.recipe["eos_id"]
    documents = read_sample([args.texts], text_field="text").documents
    texts = [d.text for d in documents[:: max(len(documents) // args.num, 1)]][: args.num]
    with tempfile.TemporaryDirectory() as folder:
        ours.save(pathlib.Path(folder) / "hf", format="hf")
        tokenizer = transformers.AutoTokenizer.from_pretrained(f"{folder}/hf")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/hf")
    compute = jax.jit(ours.model.logits)
    worst = largest = 0.0
    tokens = same_ids = same_texts = 0
    generated: list[int] = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        same_ids += ids == [eos_id, *ours.tokenizer.encode(text)]
        ids = ids[:seq_len]
        row = np.zeros((1, seq_len), np.int32)
        row[0, : len(ids)] = ids  # padding lies behind: no position sees it
        expected = np.asarray(compute(ours.params, row))[0, : len(ids)]
        prompt = ids[: max(len(ids) // 8, 1)]
        with torch.no_grad():
            found = theirs(torch.tensor([ids])).logits[0].numpy()
            settings = {"max_new_tokens": args.tokens, "do_sample": False}
            answer = theirs.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()
        settings = {"seq_len": seq_len, "max_tokens": args.tokens, "temperature": 0}
        same_texts += answer == generate_ids(
            ours.model, ours.params, prompt, eos_id=eos_id, **settings
        )
        worst = max(worst, float(np.abs(found - expected).max()))
        largest = max(largest, float(np.abs(expected).max()))
        tokens, generated = tokens + len(ids), generated + answer
    m = ours.recipe["model"]
    print(
        f"transformers {transformers.__version__}, tied {m['tie_embeddings']}, "
        f"{m['num_heads']} heads / {m['num_kv_heads']} key-value heads: {len(texts)} texts, "
        f"{tokens} tokens; logits differ by at most {worst:.1e} (largest {largest:.1f}); ids equal "
        f"in {same_ids}, greedy texts in {same_texts} ({len(generated)} tokens, "
        f"{len(set(generated))} different ones)"
    )
    return int(worst > 1e-4 or not len(texts) == same_ids == same_texts)


if __name__ == "__main__":
    sys.exit(main())
