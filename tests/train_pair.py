"""Train the demo pair: a small Gemma 4 target and its drafter, stored as ordinary Hugging Face folders.

    python tests/train_pair.py                    # 28 minutes on two cores, into tests/pair
    python tests/train_pair.py --minutes 2 --out /tmp/pair

The target (per-layer embeddings, shared-KV layers, sliding and full attention, double-wide MLP, like E2B) learns the
text of the standard library. The drafter learns to guess what the target says: from its hidden states and KV cache,
several tokens ahead with its own recurrent state, mostly on text that the target wrote. Its ordered embeddings are
clusters of the target's token embeddings. The last line is one JSON object with figures measured on files that were
held out.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from train_data import CHAT_TEMPLATE, NAMED, VOCAB, Sampler, held_out_prompts, read_texts, train_tokenizer
from transformers import Gemma4Config, Gemma4ForConditionalGeneration
from transformers.models.gemma4_assistant import Gemma4AssistantConfig, Gemma4AssistantForCausalLM

LENGTH = 256  # tokens of a training sequence
WINDOW = 128
STEPS = 4  # how far ahead the drafter learns to guess
SLIDING, FULL = "sliding_attention", "full_attention"
ROPE = {
    FULL: {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
}
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "global_head_dim": 128,
    "sliding_window": WINDOW,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "rope_parameters": ROPE,
}
console = Console()


def make_target() -> Gemma4ForConditionalGeneration:
    """The untrained target: six layers, of which the last three read the keys and values of the second and third."""
    text = COMMON | {
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 6,
        "layer_types": [SLIDING, SLIDING, FULL] * 2,
        "num_kv_shared_layers": 3,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": VOCAB,
        "use_double_wide_mlp": True,
        "final_logit_softcapping": 30.0,
    }
    return Gemma4ForConditionalGeneration(Gemma4Config(text_config=text, vision_config=None, audio_config=None))


def make_drafter() -> Gemma4AssistantForCausalLM:
    """The untrained drafter: four layers without keys and values, ordered embeddings over 96 clusters of 32 tokens."""
    text = COMMON | {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "layer_types": [SLIDING, SLIDING, SLIDING, FULL],
        "num_kv_shared_layers": 4,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "use_double_wide_mlp": False,
        "final_logit_softcapping": None,
    }
    config = Gemma4AssistantConfig(
        text_config=text,
        backbone_hidden_size=256,
        use_ordered_embeddings=True,
        num_centroids=96,
        centroid_intermediate_top_k=12,
    )
    return Gemma4AssistantForCausalLM(config)


class Optimizers:
    """Muon for the matrices inside the layers, AdamW for embeddings and vectors; the rate falls linearly with time.

    Says under a name how far it is, and the mean of the latest losses, every 20 seconds.
    """

    def __init__(self, name: str, model: nn.Module, muon: float, adam: float, seconds: float) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        inner = [p for name, p in named if p.ndim == 2 and "embed" not in name and "lm_head" not in name]
        outer = [p for _, p in named if not any(p is q for q in inner)]
        self.parts = [
            torch.optim.Muon(inner, lr=muon, momentum=0.95, weight_decay=0.01),
            torch.optim.AdamW(outer, lr=adam, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.rates = [muon, adam]
        self.seconds, self.start, self.steps = seconds, time.monotonic(), 0
        self.name, self.shown, self.mean = name, 0.0, 8.0

    def elapsed(self) -> float:
        """Share of the time that is used up."""
        return (time.monotonic() - self.start) / self.seconds

    def step(self, loss: Tensor) -> None:
        self.steps += 1
        factor = min(self.steps / 50, 1.0) * max(0.02, min(1.0, (1 - self.elapsed()) / 0.6))
        for part, rate in zip(self.parts, self.rates, strict=True):
            part.param_groups[0]["lr"] = rate * factor
            part.zero_grad(set_to_none=True)
        loss.backward()
        for part in self.parts:
            part.step()
        self.mean += 0.02 * (loss.item() - self.mean)
        if time.monotonic() - self.shown > 20:
            self.shown = time.monotonic()
            console.print(f"{self.name} {self.elapsed():5.1%} step {self.steps:5d} loss {self.mean:.3f}")


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=0)


def train_target(target: nn.Module, sampler: Sampler, seconds: float, batch: int) -> None:
    optimizers = Optimizers("target", target, muon=0.02, adam=0.004, seconds=seconds)
    target.train()
    while optimizers.elapsed() < 1:
        ids = torch.tensor(sampler.batch(batch), device=device_of(target))
        with torch.autocast(ids.device.type, torch.bfloat16):
            loss = next_token_loss(target, ids)
        optimizers.step(loss)
    target.eval()


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@torch.no_grad()
def written(target: Any, prompts: Tensor, count: int) -> Tensor:
    """Greedy continuations of prompts [rows, n] by `count` tokens, prompts included."""
    made: Tensor = target.generate(
        prompts, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0, use_cache=True
    )
    return made


def written_by_target(target: Any, sampler: Sampler, seconds: float, rows: int) -> Tensor:
    """Training text for the drafter: prompts of various lengths continued by the target to LENGTH tokens."""
    made: list[Tensor] = []
    start, chooser = time.monotonic(), random.Random(3)
    while time.monotonic() - start < seconds or not made:
        keep = chooser.randrange(24, 140)
        prompts = torch.tensor(sampler.batch(rows), device=device_of(target))[:, :keep]
        prompts = prompts[(prompts != 0).all(1)]
        made.append(written(target, prompts, LENGTH - keep).cpu())
        console.print(f"text by the target: {sum(map(len, made))} sequences")
    return torch.cat(made)


def clusters(rows: Tensor, count: int) -> Tensor:
    """Balanced spherical k-means of rows [n, d] into `count` clusters of n / count; returns row numbers by cluster."""
    rows = F.normalize(rows.float(), dim=1)
    size = len(rows) // count
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    for _ in range(12):
        centers = F.normalize(rows[order].view(count, size, -1).mean(1), dim=1)
        best = (rows @ centers.T).flatten().argsort(descending=True).tolist()
        room, cluster = [size] * count, [-1] * len(rows)
        for pair in best:  # the closest pairs first, as long as the cluster has room
            row, center = divmod(pair, count)
            if cluster[row] < 0 and room[center]:
                cluster[row], room[center] = center, room[center] - 1
        order = torch.tensor(cluster).argsort(stable=True)
    return order


class Context:
    """What the drafter reads of the target for a batch of sequences: hidden rows, keys and values, and what it says."""

    @torch.no_grad()
    def __init__(self, target: Any, ids: Tensor) -> None:
        out = target(input_ids=ids, output_hidden_states=True, return_shared_kv_states=True, use_cache=False)
        self.ids = ids
        self.hidden = out.hidden_states[-1].float()
        self.says = out.logits.float()
        self.keys = {kind: (k.float(), v.float()) for kind, (k, v) in out.shared_kv_states.items()}
        self.embedded = target.get_input_embeddings()(ids).float()
        n = ids.shape[1]
        position, key = torch.arange(n, device=ids.device)[:, None], torch.arange(n, device=ids.device)[None]
        seen = key < position  # the cache holds what stands before the last token
        self.masks = {FULL: seen[None, None], SLIDING: (seen & (key > position - WINDOW))[None, None]}


def draft_step(drafter: Any, context: Context, embedded: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """One step for every position at once, as in transformers' SinglePositionMultiTokenCandidateGenerator.

    Row t reads a token's embedding and a hidden row, stands at position t and sees the keys before it, in all steps.
    Returns the drafter's normed state [rows, n, 128] and the recurrent hidden row [rows, n, 256].
    """
    positions = torch.arange(context.ids.shape[1], device=context.ids.device)[None]
    state = drafter.model(
        inputs_embeds=drafter.pre_projection(torch.cat([embedded, hidden], -1)),
        attention_mask=context.masks,
        position_ids=positions,
        shared_kv_states=context.keys,
        use_cache=False,
    ).last_hidden_state
    return state, drafter.post_projection(state)


def shifted(rows: Tensor, by: int) -> Tensor:
    """Rows moved up by `by` positions, the end filled with the last row."""
    return torch.cat([rows[:, by:], rows[:, -1:].expand(-1, by, *rows.shape[2:])], 1) if by else rows


def before(hidden: Tensor) -> Tensor:
    """At t the target's hidden row of t - 1."""
    return torch.cat([hidden[:, :1], hidden[:, :-1]], 1)


def draft_loss(drafter: Any, context: Context, cluster_of: Tensor) -> Tensor:
    """Cross-entropy with the target's choice and its distribution, and of the centroids with the choice's cluster."""
    hidden, total = before(context.hidden), torch.zeros((), device=context.ids.device)
    for step in range(STEPS):
        state, hidden = draft_step(drafter, context, shifted(context.embedded, step), hidden)
        rows = slice(1, context.ids.shape[1] - step)
        valid = (context.ids[:, step:] != 0)[:, rows]
        says = shifted(context.says, step)[:, rows][valid]
        state = state[:, rows][valid]
        logits, choice = drafter.lm_head(state).float(), says.argmax(-1)
        total = total + 0.6 * F.cross_entropy(logits, choice) + 0.4 * F.cross_entropy(logits, says.softmax(-1))
        total = total + 0.3 * F.cross_entropy(drafter.masked_embedding.centroids(state).float(), cluster_of[choice])
    return total / STEPS


def train_drafter(drafter: Any, target: Any, sampler: Sampler, own: Tensor, seconds: float, batch: int) -> None:
    order = clusters(target.get_input_embeddings().weight.detach().cpu(), drafter.config.num_centroids)
    drafter.masked_embedding.token_ordering.copy_(order)
    cluster_of = torch.empty_like(order)
    cluster_of[order] = torch.arange(VOCAB) // (VOCAB // drafter.config.num_centroids)
    cluster_of = cluster_of.to(device_of(target))
    optimizers = Optimizers("drafter", drafter, muon=0.02, adam=0.004, seconds=seconds)
    chooser = random.Random(5)
    drafter.train()
    while optimizers.elapsed() < 1:
        rows = own[torch.tensor([chooser.randrange(len(own)) for _ in range(batch)])]
        if chooser.random() < 0.15:
            rows = torch.tensor(sampler.batch(batch))
        context = Context(target, rows.to(device_of(target)))
        with torch.autocast(context.ids.device.type, torch.bfloat16):
            loss = draft_loss(drafter, context, cluster_of)
        optimizers.step(loss)
    drafter.eval()


@torch.no_grad()
def acceptance(drafter: Any, target: Any, prompts: list[list[int]], drafted: int = 3) -> dict[str, Any]:
    """Greedy acceptance while the target continues prompts, by simulating every round on the text it writes."""
    hits, rounds, distinct = [0] * drafted, 0, []
    for ids in prompts:
        start = len(ids)
        text = written(target, torch.tensor([ids], device=device_of(target)), 128)
        context = Context(target, text)
        embedded, hidden, agreed = context.embedded, before(context.hidden), []
        for step in range(drafted):
            state, hidden = draft_step(drafter, context, embedded, hidden)
            guess = drafter.masked_embedding(state, drafter.lm_head.weight).argmax(-1)
            embedded = target.get_input_embeddings()(guess).float()
            agreed.append(guess == shifted(text, step + 1))
        place, end = start, text.shape[1] - drafted
        while place < end:
            rounds += 1
            length = 0
            while length < drafted and agreed[length][0, place]:
                hits[length] += 1
                length += 1
            place += length + 1
        made = text[0, start:].tolist()
        distinct.append(len({tuple(made[i : i + 4]) for i in range(len(made) - 3)}) / (len(made) - 3))
    return {
        "acceptance": round(sum(hits) / (rounds * drafted), 4),
        "by_position": [round(count / rounds, 4) for count in hits],
        "tokens_per_pass": round(1 + sum(hits) / rounds, 3),
        "distinct_4_grams": round(sum(distinct) / len(distinct), 3),
    }


def save(out: Path, target: Any, drafter: Any, tokenizer: Any, prompts: Any) -> None:
    """Write both folders and the prompts beside each other, each folder by rename."""
    generation = {
        "bos_token_id": 2,
        "pad_token_id": 0,
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 64,
        "top_p": 0.95,
    }
    assistant = {"is_assistant": True, "num_assistant_tokens": 6, "num_assistant_tokens_schedule": "constant"}
    parts = (
        ("gemma-4-demo", target, generation | {"eos_token_id": [1, 106, 50]}),
        (
            "gemma-4-demo-assistant",
            drafter,
            {"bos_token_id": 2, "pad_token_id": 0, "eos_token_id": [1, 106]} | assistant,
        ),
    )
    for name, model, config in parts:
        folder, work = out / name, out / f"{name}.part"
        shutil.rmtree(work, ignore_errors=True)
        model.to("cpu", torch.bfloat16).save_pretrained(work)
        (work / "generation_config.json").write_text(json.dumps(config, indent=2) + "\n")
        (work / "tokenizer.json").write_text(tokenizer.to_str(pretty=False))
        settings = {"tokenizer_class": "GemmaTokenizer", "model_max_length": 2048, "add_bos_token": True} | NAMED
        (work / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        if model is target:
            (work / "chat_template.jinja").write_text(CHAT_TEMPLATE)
        for path in work.iterdir():
            path.chmod(0o644)
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)
    (out / "prompts.json").write_text(json.dumps(prompts, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pair")
    parser.add_argument("--minutes", type=float, default=28, help="time for the whole training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    texts = read_texts()
    tokenizer = train_tokenizer(texts)
    sampler = Sampler(tokenizer, texts.training, LENGTH, seed=1)
    batch, seconds = (64 if arguments.device != "cpu" else 16), arguments.minutes * 60
    target, drafter = make_target().to(arguments.device), make_drafter().to(arguments.device)
    console.print(f"{sum(sampler.weights)} tokens; {sum(p.numel() for p in target.parameters())} parameters in the "
                  f"target, {sum(p.numel() for p in drafter.parameters())} in the drafter")  # fmt: skip
    train_target(target, sampler, seconds * 0.38, batch)
    target.to(torch.bfloat16).float()  # what is stored is what the drafter must learn from
    own = written_by_target(target, sampler, seconds * 0.14, rows=96)
    train_drafter(drafter, target, sampler, own, seconds * 0.46, batch // 2)
    drafter.to(torch.bfloat16).float()
    prompts = held_out_prompts(tokenizer, texts, 48)
    chats = [f"Continue this file:\n{prompt['text']}" for prompt in prompts[40:]]
    held = [tokenizer.encode(prompt["text"]).ids for prompt in prompts[:40]]
    figures = acceptance(drafter, target, held)
    sample = Sampler(tokenizer, texts.held_out, LENGTH, seed=2)
    with torch.no_grad():
        figures["held_out_loss"] = round(
            next_token_loss(target, torch.tensor(sample.batch(32), device=arguments.device)).item(), 4
        )
    console.print(tokenizer.decode(written(target, torch.tensor([held[0]], device=arguments.device), 128)[0].tolist()))
    save(arguments.out, target, drafter, tokenizer, {"prompts": prompts[:40], "chat": chats})
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
