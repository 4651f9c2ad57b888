"The reward model, the PPO policy and the report of `make demo`."
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import mlx_pretrain  # noqa: F401, I001 (before MLX)

import mlx.core as mx
import numpy as np
import pytest

from mlx_pretrain.config import load_config
from mlx_pretrain.ppo import PPOConfig, PPOTrainer
from mlx_pretrain.pretrained import load
from mlx_pretrain.prompt import prompt_ids
from mlx_pretrain.reward_model import load_reward
from mlx_pretrain.run import read_metadata, read_metrics

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from compare import instruction  # noqa: E402
from preferences import answers  # noqa: E402
from report import number, evaluate_checkpoints, text  # noqa: E402

SFT, REWARD, RL, PAGE = (Path("runs", name) for name in ("demo-sft", "demo-reward", "demo-rl",
                                                         "demo/report.html"))


def rows(name):
    return [json.loads(line) for line in Path("data", name).read_text(encoding="utf-8").splitlines()]


def friendly(texts):
    "VADER sentiment."
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    analyser = SentimentIntensityAnalyzer()
    return np.array([analyser.polarity_scores(text)["compound"] for text in texts])


def questions(): return [*dict.fromkeys(row["instruction"] for row in rows("exchanges/val.jsonl"))]


@pytest.fixture(scope="module")
def before(): return friendly(answers(load(SFT), questions() * 3, seed=5))


def test_chosen_responses_have_higher_sentiment():
    for name in ("train", "val"):
        pairs = rows(f"preferences/{name}.jsonl")
        assert (
            len(pairs) > 40
            and (friendly(p["chosen"] for p in pairs) > friendly(p["rejected"] for p in pairs) + 0.19).all()
        )
    assert not {p["prompt"] for p in rows("preferences/train.jsonl")} & {
        p["prompt"] for p in rows("preferences/val.jsonl")
    }


def test_accuracy_on_held_out_pairs():
    "Pair by pair, each text alone, read off at the last token."
    reward, correct, pairs = load_reward(REWARD), [], rows("preferences/val.jsonl")
    tok, fmt = reward.tokenizer, reward.format
    for pair in pairs:
        ask = prompt_ids(tok, fmt.format_question(pair["prompt"]))
        texts = [[*ask, *tok.encode(fmt.format_response(pair[key])), tok.eos_id]
                 for key in ("chosen", "rejected")]
        chosen, rejected = (reward.model.values(mx.array([ids]))[0, -1].item() for ids in texts)
        correct.append(chosen > rejected)
    accuracy = read_metadata(REWARD)["reward_model"]["accuracy"]
    assert abs(np.mean(correct) - accuracy) < 2.5 / len(pairs) and np.mean(correct) > 0.6


def test_reward_is_normalized_on_the_fine_tuned_model():
    policy = load(SFT)
    asks = [policy.format.format_question(question) for question in questions() * 3]
    scores = load_reward(REWARD).compute_reward(asks, answers(policy, questions() * 3, seed=6))
    assert abs(scores.mean()) < 0.4 and 0.7 < scores.std() < 1.3


def test_ppo_raised_the_gold_reward(before):
    "It was not trained on: by more than a standard deviation of the fine-tuned model's answers."
    after = friendly(answers(load(RL), questions() * 3, seed=5))
    assert after.mean() > before.mean() + before.std()


@pytest.mark.parametrize("seed", [43, 44])
def test_ppo_raises_the_gold_reward_on_other_seeds(seed, before):
    trainer = PPOTrainer(load_config(PPOConfig, Path("configs/demo-rl.yaml"), {"system.seed": seed}))
    kl = [trainer.step()["kl"] for _ in range(trainer.total_steps)]
    policy = load(SFT)._replace(model=trainer.model)
    after = friendly(answers(policy, questions() * 3, seed=5))
    gain = (after.mean() - before.mean()) / before.std()
    print(f"seed {seed}: {before.mean():.3f} → {after.mean():.3f}, {gain:+.2f} standard deviations, "
          f"KL {np.mean(kl[-5:]):.1f} nats")
    assert kl[0] == 0 < np.mean(kl[-5:]) < 40 and after.mean() > before.mean() + before.std()


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]


def test_report_is_self_contained_and_shows_the_accuracy():
    text, page = PAGE.read_text(encoding="utf-8"), Page()
    page.feed(text)
    assert page.tags.count("img") == 5 and "script" not in page.tags
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not re.search(r"https?://|@import|url\(", text) and text.count("<tr>") > 25
    assert f"{read_metadata(REWARD)['reward_model']['accuracy']:.0%}" in text


def test_report_shows_answers_of_both_policies():
    "Sampled again: the first of the ten answers, and the means in the table."
    page, (evaluations, fmt) = PAGE.read_text(encoding="utf-8"), evaluate_checkpoints(SFT, RL)
    tok = load(SFT).tokenizer
    first, last = evaluations[0], evaluations[-1]
    for evaluation in (first, last):
        assert text(evaluation.sampled.response_texts[0]) in page and number(evaluation.gold.mean()) in page
    assert text(instruction(tok, first.sampled.prompts[0], fmt.prompt_format)) in page
    assert last.step == read_metrics(RL)[-1]["step"] and first.kl.mean() == 0 < last.kl.mean()
    assert (friendly(last.sampled.response_texts) == last.gold.astype(float).round(4)).all()
