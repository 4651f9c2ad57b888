"""Write short exchanges as JSON Lines: data/exchanges/train.jsonl, and a tenth of the prompts in
data/exchanges/val.jsonl.

They come from the package `chatterbot-corpus` (BSD); pip install chatterbot-corpus vaderSentiment. Of each
conversation the first two lines are taken, and each pair once. A prompt is either in one file or in the
other, however it is spelt. Beside each response stands how friendly it sounds to VADER, from -1 to 1, as its
`reward`; fine-tuning passes over it.
"""
import hashlib
import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import yaml


def exchanges(folder):
    "Prompt and response, each pair once."
    found = {}
    for file in sorted(folder.glob("*.yml")):
        for conversation in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            if not isinstance(conversation, list) or len(conversation) < 2:  # one entry is no conversation
                continue
            prompt, response = (line.strip() for line in conversation[:2])
            found.setdefault((spelt(prompt), response), (prompt, response))
    return found


def spelt(prompt):
    "The prompt without what people spell differently."
    return " ".join(re.findall(r"\w+", prompt.lower()))


def held_out(prompt): return int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 10 == 0


def main(folder=Path("data/exchanges")):
    package = find_spec("chatterbot_corpus")
    if package is None or find_spec("vaderSentiment") is None:
        sys.exit(
            "The exchanges and their rewards need two packages: pip install chatterbot-corpus vaderSentiment"
        )
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    friendly = SentimentIntensityAnalyzer().polarity_scores
    found = exchanges(Path(package.origin).parent / "data" / "english")
    folder.mkdir(parents=True, exist_ok=True)
    for name, wanted in (("train", False), ("val", True)):
        pairs = [pair for (prompt, _), pair in found.items() if held_out(prompt) == wanted]
        rows = [{"instruction": asked, "response": said, "reward": friendly(said)["compound"]}
                for asked, said in pairs]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n"
                                                      for row in rows), encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(rows)} exchanges")


if __name__ == "__main__": main()
