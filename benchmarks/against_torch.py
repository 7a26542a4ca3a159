"""Time of one train step against a straightforward PyTorch Soup-of-Experts doing the same work.

    pip install torch==2.13.0
    python benchmarks/against_torch.py [--experts=0,8,32] [--mixtures=1] [--rounds=11] [--compile]

The PyTorch one is what the equations say, written with the library's own fast paths: a Llama-style
decoder with scaled_dot_product_attention, every parameter in the bank, merged leaf by leaf with
`S + einsum("e,e...->...", alpha, E)`, `functional_call`, autograd through everything, gradient
clipping and fused AdamW. Float32, the same shapes and random tokens, all cores for both.

Before anything is timed, three steps of both must give the same losses: parameters are copied from
ours, and our `optimizer.bank = "adamw"` is the same update. Then the variants of one number of
experts take turns, so that a machine whose speed drifts slows all of them alike. After every turn
the threads of both are left to fall asleep: they spin for some milliseconds after their last work.
"""

import argparse
import os
import statistics
import time

import common
import jax
import numpy as np

from soup_jax import tree
from soup_jax.experiments import base

try:
    import torch
    import torch.nn.functional as F
    from torch import nn
except ModuleNotFoundError as e:
    raise SystemExit(
        "PyTorch is not installed; this benchmark alone needs it:\n  pip install torch==2.13.0"
    ) from e

TOLERANCE = 1e-4  # of losses, in nats


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.scale.shape, self.scale, self.eps)


def rotate(x, cos, sin):
    """[B, H, L, head_dim], halves of a head rotated; cos and sin [L, head_dim / 2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        for name in ("query", "key", "value", "out"):
            setattr(self, name, nn.Linear(dim, dim, bias=False))

    def forward(self, x, cos, sin):
        def heads(y):
            return y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        query = rotate(heads(self.query(x)), cos, sin)
        key = rotate(heads(self.key(x)), cos, sin)
        y = F.scaled_dot_product_attention(query, key, heads(self.value(x)), is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.gate = nn.Linear(dim, hidden_dim, bias=False)
        self.up = nn.Linear(dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, m):
        super().__init__()
        self.attention_norm = RMSNorm(m.dim, m.norm_eps)
        self.attention = Attention(m.dim, m.num_heads)
        self.mlp_norm = RMSNorm(m.dim, m.norm_eps)
        self.mlp = Mlp(m.dim, m.hidden_dim)

    def forward(self, x, cos, sin):
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """Tokens [B, L] and targets [B, L] to the mean cross-entropy in nats."""

    def __init__(self, cfg):
        super().__init__()
        m = cfg.model
        self.embedding = nn.Embedding(cfg.vocab_size, m.dim)
        self.layers = nn.ModuleList(Block(m) for _ in range(m.num_layers))
        self.final_norm = RMSNorm(m.dim, m.norm_eps)
        half = m.dim // m.num_heads // 2
        frequency = m.rope_theta ** (-torch.arange(half) / half)
        angle = torch.arange(cfg.seq_len)[:, None] * frequency
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, tokens, targets):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        logits = F.linear(self.final_norm(x), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Router(nn.Module):
    """h [M, K] -> alpha [M, E], shrunk into the unit ball (`soup_jax.soup.router`)."""

    def __init__(self, values):
        super().__init__()
        self.register_buffer("frequencies", torch.tensor(values.pop("frequencies")))
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(torch.tensor(value)))

    def forward(self, h):
        x = h - self.frequencies
        z = x @ self.linear
        z = z + F.gelu(x @ self.hidden + self.hidden_bias, approximate="tanh") @ self.out
        square = (z * z).sum(-1, keepdim=True) + 1e-12
        return z * torch.rsqrt(square.clamp(min=1.0))


class Soup:
    """Shared parameters, bank and router with their optimizer; `advance()` is one step."""

    def __init__(self, cfg, params, batch, *, compile_):
        o = cfg.optimizer
        self.clip_norm = o.clip_norm
        self.model = Decoder(cfg)
        for name, value in torch_names(params["shared"]).items():
            self.model.get_parameter(name).data.copy_(torch.tensor(value))
        self.shared = dict(self.model.named_parameters())
        self.bank = {
            name: nn.Parameter(torch.tensor(value).contiguous())
            for name, value in torch_names(params["bank"].get("dense", {}), leading=1).items()
        }
        self.router: Router | None = None
        if self.bank:
            router = tree.flatten(params["router"])
            self.router = Router({name: np.asarray(leaf) for name, leaf in router.items()})
        parts = [
            (self.shared, o.learning_rate, o.weight_decay),
            (self.bank, o.learning_rate * o.bank_lr_scale, o.weight_decay),
        ]
        groups = [
            {"params": leaves, "lr": rate, "weight_decay": decay if decays else 0.0}
            for named, rate, decay in parts
            for decays in (True, False)
            if (leaves := [p for n, p in named.items() if n.endswith("weight") == decays])
        ]
        if self.router:
            rate = o.learning_rate * o.router_lr_scale
            groups.append({"params": [*self.router.parameters()], "lr": rate, "weight_decay": 0.0})
        self.parameters = [p for group in groups for p in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, betas=(o.beta1, o.beta2), eps=o.eps, fused=True)
        tokens = torch.tensor(np.asarray(batch.rows["tokens"])).long()
        self.tokens_M = tokens.unflatten(0, (cfg.num_mixtures, -1))
        self.h = torch.tensor(np.asarray(batch.h_MK))
        self.loss = torch.compile(self._loss) if compile_ else self._loss

    def _loss(self):
        if self.router is None:
            tokens = self.tokens_M.flatten(0, 1)
            return self.model(tokens[:, :-1], tokens[:, 1:])
        losses = []
        for alpha, tokens in zip(self.router(self.h), self.tokens_M):
            theta = {
                name: leaf + torch.einsum("e,e...->...", alpha, self.bank[name])
                for name, leaf in self.shared.items()
            }
            inputs = (tokens[:, :-1], tokens[:, 1:])
            losses.append(torch.func.functional_call(self.model, theta, inputs))
        return torch.stack(losses).mean()

    def advance(self):
        """One step; its loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.optimizer.step()
        return loss.item()


def torch_names(params, *, leading=0):
    """Our leaves by the decoder's names: a layer each, and [out, in] where ours are [in, out]."""
    named = {}
    for path, leaf in tree.flatten(params).items():
        leaf = np.asarray(leaf)
        if path == "embedding":
            named["embedding.weight"] = leaf
        elif not path.startswith("layers/"):
            named[path.replace("/", ".")] = leaf
        else:
            for i, layer in enumerate(np.moveaxis(leaf, leading, 0)):
                name = f"layers.{i}.{path.removeprefix('layers/').replace('/', '.')}"
                if path.endswith("scale"):
                    named[name] = layer
                else:
                    named[f"{name}.weight"] = layer.swapaxes(-1, -2)
    return named


class Ours:
    """The same interface over our step."""

    def __init__(self, cfg):
        self.training = common.build(cfg)
        self.total = 0.0

    def advance(self):
        """One step; its loss."""
        self.training.advance()
        jax.block_until_ready(self.training.state)
        before, self.total = self.total, float(self.training.sums["loss"])
        return self.total - before


def build(cfg, banks, *, compile_):
    """{name: variant}, after three steps that must have given the same losses as PyTorch's."""
    variants = {}
    theirs = None
    for bank in banks if cfg.num_experts else banks[:1]:
        cfg.optimizer.bank = bank
        ours = Ours(cfg)
        if theirs is None:
            params, batch = ours.training.state.params, ours.training.batch
            theirs = Soup(cfg, params, batch, compile_=compile_)
            their_losses = [theirs.advance() for _ in range(3)]
        losses = [ours.advance() for _ in range(3)]
        # Another bank optimizer moves the bank differently: only its first loss is the same.
        same = 3 if bank == "adamw" or not cfg.num_experts else 1
        worst = max(abs(a - b) for a, b in zip(losses[:same], their_losses))
        if worst > TOLERANCE:
            raise SystemExit(f"not the same work: losses {losses} here, {their_losses} in PyTorch")
        print(f"{cfg.num_experts:>7}  {bank}: {same} loss(es) as PyTorch's within {worst:.0e} nats")
        variants[f"ours, {bank}" if cfg.num_experts else "ours"] = ours
    return {"torch": theirs, **variants}


def measure(variants, *, rounds, rest):
    """Seconds of a step, a list for each variant; one turn each in every round."""
    seconds = {name: [] for name in variants}
    for _ in range(rounds):
        for name, variant in variants.items():
            time.sleep(rest)
            variant.advance()  # brings caches back that another variant has emptied
            start = time.perf_counter()
            variant.advance()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def make_config(num_experts, args):
    """The config of one number of experts."""
    cfg = base.get_config()
    cfg.num_experts, cfg.num_mixtures = num_experts, args.mixtures if num_experts else 1
    cfg.vocab_size, cfg.seq_len, cfg.batch_size = 4096, args.seq_len, args.batch_size
    cfg.model.update({"num_layers": args.layers, "dim": args.dim, "hidden_dim": args.hidden})
    cfg.model.num_heads = cfg.model.num_kv_heads = args.heads
    cfg.experts.init_scale = 0.1  # not zero, or the first losses would not tell of the merge
    cfg.optimizer.update({"schedule": "constant", "warmup_steps": 0, "learning_rate": 1e-3})
    return cfg


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", default="0,8,32", help="0: the dense step")
    parser.add_argument("--banks", default="adamw,merged", help="our bank optimizers")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--rest", type=float, default=0.05, help="seconds between turns")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the loss")
    for name, value in (("mixtures", 1), ("dim", 256), ("layers", 4), ("hidden", 704)):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in (("heads", 4), ("seq_len", 256), ("batch_size", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # as many as jax takes
    print(f"{'experts':>7}  {'variant':<16}{'median ms':>10}{'fastest':>9}{'torch / it':>12}")
    for num_experts in (int(e) for e in args.experts.split(",")):
        cfg = make_config(num_experts, args)
        variants = build(cfg, args.banks.split(","), compile_=args.compile)
        seconds = measure(variants, rounds=args.rounds, rest=args.rest)
        for name, values in seconds.items():
            ratio = statistics.median(t / v for t, v in zip(seconds["torch"], values))
            middle, least = 1e3 * statistics.median(values), 1e3 * min(values)
            print(
                f"{num_experts:>7}  {name:<16}{middle:>10.1f}{least:>9.1f}{ratio:>12.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
