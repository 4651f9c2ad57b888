"""One page about a whole road, runs/demo/report.html: everything is in the file, so that it can be sent to somebody.

    python tools/report.py runs/demo runs/demo-sft runs/demo-reward runs/demo-rl

Each policy on the way answers the held-out questions of the last run with the same random numbers. What it says is judged twice: by the
reward model that PPO was told to please, and by VADER, which decided the preferences and which PPO never saw.
"""
import base64
import html
import io
import json
import sys
from pathlib import Path
from typing import NamedTuple

import mlx_pretrain  # noqa: F401, I001 (before MLX)

import mlx.core as mx
import numpy as np
from matplotlib.figure import Figure

from compare import asked as question_in
from mlx_pretrain.config import UserError, load_config
from mlx_pretrain.prompts import pad_prompt_response, read_prompts
from mlx_pretrain.generate import generate_text
from mlx_pretrain.plot import plot_runs
from mlx_pretrain.ppo import PPOConfig, Samples, log_probs, sample_responses
from mlx_pretrain.pretrained import load
from mlx_pretrain.reward_model import load_reward
from mlx_pretrain.rules import Sentiment
from mlx_pretrain.run import checkpoints, read_metadata, read_metrics
from mlx_pretrain.score import score

SHOWN, BEGINNING = 10, "The state of the Union is"  # samples side by side; how a text begins
STYLE = """
body { max-width: 62rem; margin: 2.5rem auto; padding: 0 1.2rem; font: 16px/1.55 system-ui, sans-serif; color: #1d2733; background: #fff }
h1 { font-size: 2rem; line-height: 1.2 } h2 { margin-top: 2.6rem } p { max-width: 44rem } img { max-width: 100%; height: auto }
table { border-collapse: collapse; width: 100% } td, th { padding: .45rem .7rem; border-bottom: 1px solid #e3e8ee; text-align: left;
vertical-align: top } th { color: #5b6b7c; font-weight: 600; white-space: nowrap } td { overflow-wrap: anywhere }
td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums } td.word { white-space: nowrap }
.good { color: #1b7a43 } .bad { color: #b3261e } .quiet { color: #5b6b7c }
blockquote { margin: .8rem 0; padding: .2rem 1rem; border-left: 3px solid #c9d4df; max-width: 44rem; white-space: pre-wrap }
"""


class Judged(NamedTuple):
    "A policy on the way: steps of PPO, its answers, what VADER and the reward model think of each, and its KL to the first (B,)."
    step: int
    sampled: Samples
    gold: np.ndarray
    learned: np.ndarray
    kl: np.ndarray


def judged(step, policy, first, prompts, reward, seed):
    "Let a policy answer, and judge what it says."
    sampled = sample_responses(policy, prompts, np.arange(len(prompts)), reward, seed=seed, batch_size=128)
    tokens, pad, mask = pad_prompt_response(sampled.prompts, sampled.responses, policy.tokenizer.pad_id)
    now, then = (np.array(log_probs(p.model, mx.array(tokens), mx.array(pad), mask.shape[1])[0])
                 for p in (policy, first))
    kl = np.where(mask, now - then, 0).sum(axis=1)
    return Judged(step, sampled, score(Sentiment(), sampled.prompt_texts, sampled.response_texts),
                  sampled.scores, kl)


def on_the_way(sft, rl):
    "The policy before PPO, and at each checkpoint, of which the last is the end."
    cfg, first = load_config(PPOConfig, Path(rl) / "config.yaml"), load(sft)
    reward = load_reward(cfg.reward_model)
    d = cfg.data
    prompts = read_prompts(d.validation_file, first.tokenizer, first.format,
                           d.preprocessing.max_context_size, d.response_length)
    policies = {0: first, **{int(path.name[5:]): load(path) for path in checkpoints(rl)}}
    return [judged(step, policy, first, prompts, reward, cfg.system.seed)
            for step, policy in sorted(policies.items())], first.format


def reward_against_kl(way, rows):
    "What was told and what was meant, against the distance."
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    told, meant = figure.subplots(1, 2)
    points = np.array([(row["kl"], row["reward"]) for row in rows if "kl" in row and "reward" in row])
    told.plot(*points.T, ".", color="#9db4c8", label="each step of PPO, on training questions")
    kl = [one.kl.mean() for one in way]
    told.plot(kl, [one.learned.mean() for one in way], "o-", color="#1f5f8b", label="held-out questions")
    meant.errorbar(kl, [one.gold.mean() for one in way],
                   [one.gold.std() / len(one.gold) ** 0.5 for one in way], fmt="o-", color="#1b7a43",
                   capsize=3, label="held-out questions, with standard error")
    for axes, title in (
        (told, "what PPO was told to raise: the reward model"),
        (meant, "what was meant: VADER"),
    ):
        axes.set(xlabel="KL to the fine-tuned model (nats a response)", ylabel="mean")
        axes.set_title(title, fontsize=10)
        for one, x in zip(way, kl, strict=True):
            y = (one.learned if axes is told else one.gold).mean()
            axes.annotate(f"{one.step} steps", (x, y), xytext=(5, -11), textcoords="offset points",
                          fontsize=7)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower right")
    return figure


def picture(figure, about):
    "A figure as part of the page."
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return f'<img alt="{html.escape(about)}" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def text(said): return html.escape(" ".join(said.split())) or '<span class="quiet">(nothing)</span>'


def writes(base):
    "How a pretrained model goes on."
    opened = load(base)
    return text(generate_text(opened.model, opened.tokenizer, [BEGINNING], 60, temperature=0.6,
                              top_p=0.95)[0])


def number(value):
    return f'<td class="number {"good" if value > 0.05 else "bad" if value < -0.05 else "quiet"}">{value:+.2f}</td>'


def side_by_side(before, after, question):
    "Ten answers before and after, spread over the questions."
    places = np.linspace(0, len(before.gold) - 1, min(SHOWN, len(before.gold))).round().astype(int)
    rows = [
        f"<tr><td>{text(question(before.sampled.prompts[i]))}</td><td>{text(before.sampled.response_texts[i])}</td>{number(before.gold[i])}"
        f"<td>{text(after.sampled.response_texts[i])}</td>{number(after.gold[i])}</tr>"
        for i in places
    ]
    head = "<tr><th>question</th><th>fine-tuned</th><th>VADER</th><th>after PPO</th><th>VADER</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def summary(way):
    "Both judges before and after."
    (first, last), rows = (way[0], way[-1]), []
    for name, key in (
        ("VADER, from −1 to 1: what was meant", "gold"),
        ("the reward model: what PPO was told", "learned"),
    ):
        means = "".join(number(getattr(one, key).mean()) for one in (first, last))
        rows.append(f'<tr><td>{name}</td>{means}<td class="number">{gain(way, key):+.1f} σ</td></tr>')
    head = f"<tr><th>mean over {len(first.gold)} held-out questions</th><th>before</th><th>after</th><th>gain</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def sampled_extremes(way):
    "The best and the worst sample of each stop on the way, by the reward model."
    rows = []
    for one in way:
        for name, i in (("best", one.learned.argmax()), ("worst", one.learned.argmin())):
            rows.append(
                f'<tr><td>{one.step}</td><td class="number">{one.kl.mean():.1f}</td><td class="word">{name}</td>'
                f"<td>{text(one.sampled.response_texts[i])}</td>{number(one.learned[i])}{number(one.gold[i])}</tr>"
            )
    head = "<tr><th>steps</th><th>KL</th><th></th><th>sample</th><th>reward model</th><th>VADER</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def gain(way, key):
    "How far the mean has moved, in standard deviations of what the first policy says."
    before, after = getattr(way[0], key), getattr(way[-1], key)
    return (after.mean() - before.mean()) / max(before.std(), 1e-9)


def page(way, fmt, base, sft, reward, rl):
    "The whole page."
    known, judge = read_metadata(base), read_metadata(reward)["reward_model"]
    bits = next(row["val_bits_per_byte"]
                for row in reversed(read_metrics(base)) if "val_bits_per_byte" in row)
    losses = [row["val_loss"] for row in read_metrics(sft) if "val_loss" in row]
    file = read_metadata(reward)["data"]["input_file"]["path"]
    pairs = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
    tok = load(sft).tokenizer
    seconds = sum(read_metadata(run)["took"]["seconds"] for run in (base, sft, reward, rl))
    examples = "".join(
        f"<tr><td>{text(p['prompt'])}</td><td>{text(p['chosen'])}</td><td>{text(p['rejected'])}</td></tr>"
        for p in pairs[:: max(1, len(pairs) // 4)][:4]
    )
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>From text to taste</title><style>{STYLE}</style>
<h1>From text to taste: a language model trained on this machine</h1>
<p>A Llama of {known["parameters"] / 1e6:.1f} million parameters read two centuries of speeches, learned to answer, learned from
comparisons what is friendly, and was then aligned with that. Training took {seconds / 60:.0f} minutes in all. It is far too small to make
sense; what can be seen is that each step does what it should.</p>
<h2>1 · It reads</h2>
<p>Next-token training on a text of {known["train_tokens"] / 1e6:.1f} million tokens. On six addresses it never saw it needs
<b>{bits:.2f} bits</b> for a byte.</p>
{picture(plot_runs([base]), "loss of pretraining")}
<p>How it goes on after “{BEGINNING}”:</p><blockquote>{writes(base)}</blockquote>
<h2>2 · It answers</h2>
<p>Fine-tuning on short exchanges. The loss of held-out answers fell to <b>{min(losses):.2f}</b> nats a token.</p>
{picture(plot_runs([sft]), "loss of fine-tuning")}
<h2>3 · Somebody compares</h2>
<p>It answered each question several times. Of two answers VADER, a sentiment lexicon that stands in for people, preferred the friendlier
one. A reward model learned that from pairs alone, and puts <b>{judge["accuracy"]:.0%}</b> of the held-out pairs in the right order; its
correlation with the length of an answer is {judge["length_correlation"]:.2f}.</p>
<table><tr><th>question</th><th>chosen</th><th>rejected</th></tr>{examples}</table>
{picture(plot_runs([reward]), "the reward model")}
<h2>4 · It wants to please</h2>
<p>PPO against the reward model, with a price on each nat of distance. VADER, which PPO never saw, moved by
<b>{gain(way, "gold"):+.1f} standard deviations</b> of what the fine-tuned model says, at {way[-1].kl.mean():.0f} nats.</p>
{summary(way)}
{picture(reward_against_kl(way, read_metrics(rl)), "reward against KL")}
<h2>Ten answers</h2>
{side_by_side(way[0], way[-1], lambda ids: question_in(tok, ids, fmt.prompt_format))}
<h2>Read the samples</h2>
<p>Best and worst by the reward model, from the beginning to the end. If the best ones get stranger while the reward rises, the policy has
found a hole: what the reward model likes, and nobody else. A higher <code>kl_coef</code> keeps it nearer to where it came from.</p>
{sampled_extremes(way)}
{picture(plot_runs([rl]), "PPO")}
</html>"""


def main(base, sft, reward, rl):
    way, fmt = on_the_way(sft, rl)
    path = Path(base, "report.html")
    path.write_text(page(way, fmt, base, sft, reward, rl), encoding="utf-8")
    print(
        f"On {len(way[0].gold)} held-out questions, before PPO and after it, at {way[-1].kl.mean():.1f} nats a response"
    )
    for name, key in (("VADER, which it never saw", "gold"), ("the reward model", "learned")):
        before, after = (getattr(one, key).mean() for one in (way[0], way[-1]))
        print(f"  {name:<26} {before:6.2f} → {after:5.2f}   {gain(way, key):+.1f} standard deviations")
    print(f"The page is in {path}.")


if __name__ == "__main__":
    if len(sys.argv) != 5: sys.exit(__doc__)
    try: main(*sys.argv[1:])
    except UserError as e: sys.exit(str(e))
