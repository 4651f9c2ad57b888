"""A self-contained HTML report of four runs: pretraining, fine-tuning, reward model, PPO.

    python tools/report.py runs/demo runs/demo-sft runs/demo-reward runs/demo-rl

Writes runs/demo/report.html. Each checkpoint of PPO answers the held-out questions with the same random keys.
The responses are scored twice: by the reward model that PPO maximized, and by VADER sentiment, which decided
the preferences and which PPO did not see.
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

from compare import instruction
from mlx_pretrain.config import UserError, load_config
from mlx_pretrain.prompts import pad_prompt_response, read_prompts
from mlx_pretrain.generate import generate_text
from mlx_pretrain.plot import plot_runs
from mlx_pretrain.ppo import PPOConfig
from mlx_pretrain.pretrained import load
from mlx_pretrain.reward_model import load_reward
from mlx_pretrain.rollout import Samples, log_probs, sample_responses
from mlx_pretrain.rules import Sentiment
from mlx_pretrain.run import checkpoints, read_metadata, read_metrics
from mlx_pretrain.score import score

N_EXAMPLES = 10  # responses side by side
BEGINNING = "The state of the Union is"  # the prompt of the pretrained model
STYLE = """
body { max-width: 62rem; margin: 2.5rem auto; padding: 0 1.2rem; font: 16px/1.55 system-ui, sans-serif;
  color: #1d2733; background: #fff }
h1 { font-size: 2rem; line-height: 1.2 } h2 { margin-top: 2.6rem } p { max-width: 44rem }
img { max-width: 100%; height: auto }
table { border-collapse: collapse; width: 100% }
td, th { padding: .45rem .7rem; border-bottom: 1px solid #e3e8ee; text-align: left; vertical-align: top }
th { color: #5b6b7c; font-weight: 600; white-space: nowrap } td { overflow-wrap: anywhere }
td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
td.word { white-space: nowrap }
.good { color: #1b7a43 } .bad { color: #b3261e } .quiet { color: #5b6b7c }
blockquote { margin: .8rem 0; padding: .2rem 1rem; border-left: 3px solid #c9d4df; max-width: 44rem;
  white-space: pre-wrap }
"""


class Evaluation(NamedTuple):
    """A checkpoint's responses to the held-out questions. `step`: of PPO; `gold` and `learned`: their
    scores by VADER and the reward model, (B,); `kl`: to the fine-tuned model, (B,)."""
    step: int
    sampled: Samples
    gold: np.ndarray
    learned: np.ndarray
    kl: np.ndarray


def evaluate(step, policy, reference, dataset, reward, seed):
    "Sample responses from a policy, and score them."
    sampled = sample_responses(policy, dataset, np.arange(len(dataset)), reward, seed=seed, batch_size=128)
    tokens, pad, mask = pad_prompt_response(sampled.prompts, sampled.responses, policy.tokenizer.pad_id)
    logp, ref_logp = (np.array(log_probs(p.model, mx.array(tokens), mx.array(pad), mask.shape[1])[0])
                      for p in (policy, reference))
    kl = np.where(mask, logp - ref_logp, 0).sum(axis=1)
    gold = score(Sentiment(), sampled.prompt_texts, sampled.response_texts)
    return Evaluation(step, sampled, gold, sampled.scores, kl)


def evaluate_checkpoints(sft, rl):
    "Evaluations of the policy before PPO and at each checkpoint, and the prompt format."
    cfg, first = load_config(PPOConfig, Path(rl) / "config.yaml"), load(sft)
    reward = load_reward(cfg.reward_model)
    data = cfg.data
    dataset = read_prompts(data.validation_file, first.tokenizer, first.format,
                           data.preprocessing.max_context_size, data.response_length)
    policies = {0: first, **{int(path.name[5:]): load(path) for path in checkpoints(rl)}}
    evaluations = [evaluate(step, policy, first, dataset, reward, cfg.system.seed)
                   for step, policy in sorted(policies.items())]
    return evaluations, first.format


def reward_against_kl(evaluations, rows):
    "Reward model and VADER against the KL to the fine-tuned model."
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    learned_axes, gold_axes = figure.subplots(1, 2)
    points = np.array([(row["kl"], row["reward"]) for row in rows if "kl" in row and "reward" in row])
    learned_axes.plot(*points.T, ".", color="#9db4c8", label="each step of PPO, on training questions")
    kl = [e.kl.mean() for e in evaluations]
    learned = [e.learned.mean() for e in evaluations]
    gold = [e.gold.mean() for e in evaluations]
    errors = [e.gold.std() / len(e.gold) ** 0.5 for e in evaluations]
    learned_axes.plot(kl, learned, "o-", color="#1f5f8b", label="held-out questions")
    gold_axes.errorbar(kl, gold, errors, fmt="o-", color="#1b7a43", capsize=3,
                       label="held-out questions, with standard error")
    learned_axes.set_title("reward model, which PPO maximizes", fontsize=10)
    gold_axes.set_title("VADER, which PPO does not see", fontsize=10)
    for axes, means in ((learned_axes, learned), (gold_axes, gold)):
        axes.set(xlabel="KL to the fine-tuned model (nats per response)", ylabel="mean")
        for evaluation, x, y in zip(evaluations, kl, means, strict=True):
            axes.annotate(f"{evaluation.step} steps", (x, y), xytext=(5, -11), textcoords="offset points",
                          fontsize=7)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower right")
    return figure


def picture(figure, alt):
    "A figure as an inline image."
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def text(response): return html.escape(" ".join(response.split())) or '<span class="quiet">(nothing)</span>'


def complete(base):
    "A completion by a pretrained model."
    model, tokenizer, *_ = load(base)
    return text(generate_text(model, tokenizer, [BEGINNING], 60, temperature=0.6, top_p=0.95)[0])


def number(value):
    color = "good" if value > 0.05 else "bad" if value < -0.05 else "quiet"
    return f'<td class="number {color}">{value:+.2f}</td>'


def side_by_side(before, after, question):
    "Responses before and after, spread over the questions."
    n = len(before.gold)
    rows = [
        f"<tr><td>{text(question(before.sampled.prompts[i]))}</td>"
        f"<td>{text(before.sampled.response_texts[i])}</td>{number(before.gold[i])}"
        f"<td>{text(after.sampled.response_texts[i])}</td>{number(after.gold[i])}</tr>"
        for i in np.linspace(0, n - 1, min(N_EXAMPLES, n)).round().astype(int)
    ]
    head = "<tr><th>question</th><th>fine-tuned</th><th>VADER</th><th>after PPO</th><th>VADER</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def summary(evaluations):
    "Both scores before and after."
    first, last = evaluations[0], evaluations[-1]
    rows = []
    for name, key in (("VADER sentiment, from −1 to 1", "gold"), ("the reward model", "learned")):
        means = "".join(number(getattr(evaluation, key).mean()) for evaluation in (first, last))
        rows.append(f'<tr><td>{name}</td>{means}<td class="number">{gain(evaluations, key):+.1f} σ</td></tr>')
    head = f"<th>mean over {len(first.gold)} held-out questions</th><th>before</th><th>after</th>"
    return f"<table><tr>{head}<th>gain</th></tr>{''.join(rows)}</table>"


def sampled_extremes(evaluations):
    "The best and the worst sample of each checkpoint, by the reward model."
    rows = []
    for e in evaluations:
        for name, i in (("best", e.learned.argmax()), ("worst", e.learned.argmin())):
            rows.append(f'<tr><td>{e.step}</td><td class="number">{e.kl.mean():.1f}</td>'
                        f'<td class="word">{name}</td><td>{text(e.sampled.response_texts[i])}</td>'
                        f"{number(e.learned[i])}{number(e.gold[i])}</tr>")
    head = "<th>steps</th><th>KL</th><th></th><th>sample</th><th>reward model</th><th>VADER</th>"
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def gain(evaluations, key):
    "How far the mean has moved, in standard deviations before PPO."
    before, after = getattr(evaluations[0], key), getattr(evaluations[-1], key)
    return (after.mean() - before.mean()) / max(before.std(), 1e-9)


def preference_examples(reward):
    "Four of the pairs that the reward model was trained on."
    path = read_metadata(reward)["data"]["input_file"]["path"]
    pairs = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    rows = "".join(
        f"<tr><td>{text(p['prompt'])}</td><td>{text(p['chosen'])}</td><td>{text(p['rejected'])}</td></tr>"
        for p in pairs[::max(1, len(pairs) // 4)][:4])
    return f"<table><tr><th>question</th><th>chosen</th><th>rejected</th></tr>{rows}</table>"


def page(evaluations, fmt, base, sft, reward, rl):
    "The page."
    pretraining, reward_model = read_metadata(base), read_metadata(reward)["reward_model"]
    bits = next(row["val_bits_per_byte"]
                for row in reversed(read_metrics(base)) if "val_bits_per_byte" in row)
    losses = [row["val_loss"] for row in read_metrics(sft) if "val_loss" in row]
    tok = load(sft).tokenizer
    seconds = sum(read_metadata(run)["took"]["seconds"] for run in (base, sft, reward, rl))
    first, last = evaluations[0], evaluations[-1]
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport"
 content="width=device-width"><title>From text to aligned model</title><style>{STYLE}</style>
<h1>From text to an aligned model, on this machine</h1>
<p>A Llama of {pretraining["parameters"] / 1e6:.1f} million parameters was pretrained on two centuries of
speeches, fine-tuned to answer, and aligned by PPO with a reward model that was trained on comparisons.
Training took {seconds / 60:.0f} minutes in all. The model is far too small to make sense; what can be seen
is that each stage works.</p>
<h2>1 · Pretraining</h2>
<p>Next-token training on a text of {pretraining["train_tokens"] / 1e6:.1f} million tokens. On six held-out
addresses the model has <b>{bits:.2f} bits per byte</b>.</p>
{picture(plot_runs([base]), "loss of pretraining")}
<p>Its completion of “{BEGINNING}”:</p><blockquote>{complete(base)}</blockquote>
<h2>2 · Fine-tuning</h2>
<p>On short exchanges. The loss of held-out responses fell to <b>{min(losses):.2f}</b> nats per token.</p>
{picture(plot_runs([sft]), "loss of fine-tuning")}
<h2>3 · Reward model</h2>
<p>The fine-tuned model answered each question several times. Of two responses VADER, a sentiment lexicon in
place of human annotators, preferred the friendlier one. The reward model was trained on these pairs, and
ranks <b>{reward_model["accuracy"]:.0%}</b> of the held-out pairs correctly; its correlation with the length
of a response is {reward_model["length_correlation"]:.2f}.</p>
{preference_examples(reward)}
{picture(plot_runs([reward]), "the reward model")}
<h2>4 · PPO</h2>
<p>PPO against the reward model, with a KL penalty. VADER, which PPO did not see, moved by
<b>{gain(evaluations, "gold"):+.1f} standard deviations</b>, at a KL of {last.kl.mean():.0f} nats per
response.</p>
{summary(evaluations)}
{picture(reward_against_kl(evaluations, read_metrics(rl)), "reward against KL")}
<h2>Responses before and after</h2>
{side_by_side(first, last, lambda ids: instruction(tok, ids, fmt.prompt_format))}
<h2>Best and worst samples</h2>
<p>By the reward model, at each checkpoint. If the best ones get stranger while the reward rises, the policy
exploits an error of the reward model (reward hacking). A higher <code>kl_coef</code> keeps it closer to the
fine-tuned model.</p>
{sampled_extremes(evaluations)}
{picture(plot_runs([rl]), "PPO")}
</html>"""


def main(base, sft, reward, rl):
    evaluations, fmt = evaluate_checkpoints(sft, rl)
    first, last = evaluations[0], evaluations[-1]
    path = Path(base, "report.html")
    path.write_text(page(evaluations, fmt, base, sft, reward, rl), encoding="utf-8")
    print(f"On {len(first.gold)} held-out questions, before and after PPO, "
          f"at a KL of {last.kl.mean():.1f} nats per response:")
    for name, key in (("VADER, not seen by PPO", "gold"), ("the reward model", "learned")):
        before, after = getattr(first, key).mean(), getattr(last, key).mean()
        print(f"  {name:<26} {before:6.2f} → {after:5.2f}   {gain(evaluations, key):+.1f} σ")
    print(f"The report is in {path}.")


if __name__ == "__main__":
    if len(sys.argv) != 5: sys.exit(__doc__)
    try: main(*sys.argv[1:])
    except UserError as e: sys.exit(str(e))
