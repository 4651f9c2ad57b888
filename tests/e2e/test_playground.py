"The playground in a real JupyterLab: edits change the tokens, and rows of data are escaped."

SETUP = """import json, mlx_pretrain
from mlx_pretrain.sft import SFTConfig, SFTTrainer
from mlx_pretrain.playground import Playground
rows = [{"instruction": "What is the capital of France?", "response": "Paris."},
        {"instruction": "<script>window.evil = 1</script>",
         "response": "<img src=x onerror='window.evil = 2'> costs $5, not $6"}]
open("rows.jsonl", "w").write("".join(json.dumps(row) + "\\n" for row in rows))
data = {"input_file": "rows.jsonl", "prompt_format": "Q: {instruction}\\nSay: ",
        "response_format": "{response}"}
play = Playground(SFTConfig.model_validate_json(json.dumps({"data": data})))
play"""
TRAINED = """trainer = SFTTrainer(play.config())
print(repr("".join(map(trainer.tokenizer.piece, [i for i, t in zip(*trainer.data[0]) if t]))))"""


def tokens(nb, color):
    "The texts of the tokens of a color."
    return nb.page.evaluate("""color => [...document.querySelectorAll('.widget-html code span[title]')]
        .filter(s => s.getAttribute('style').includes(color)).map(s => s.textContent)""", color)


def green(nb): return "".join(tokens(nb, "#b7e4c7"))
def grey(nb): return "".join(tokens(nb, "#e9ecef"))


def write(nb, label, text):
    nb.page.locator(".widget-textarea").filter(has_text=label).locator("textarea").fill(text)


def test_edit_changes_trained_tokens(open_notebook):
    "Words moved from the prompt's format to the response's become green; a broken format is a message."
    nb = open_notebook([SETUP, TRAINED, "print(play.yaml())"])
    nb.run(0)
    nb.until(lambda: green(nb) == "Paris.<eos>")
    assert "Say:" in grey(nb).replace("\xa0", " ")
    write(nb, "prompt_format", "Q: {instruction}\n")
    write(nb, "response_format", "Say: {response}")
    nb.until(lambda: green(nb).replace("\xa0", " ") == "Say: Paris.<eos>")
    assert "Say" not in grey(nb)
    write(nb, "response_format", "Say: {response")
    nb.page.wait_for_selector("text=/\"data.response_format\": expected/")
    write(nb, "response_format", "Say: {response}")
    nb.until(lambda: "expected" not in nb.page.inner_text(".widget-html"))
    assert nb.run(1).endswith("'Say: Paris.<eos>'\n")
    assert 'response_format: "Say: {response}"' in nb.run(2)


def test_rows_are_escaped(open_notebook):
    "A row with a script, an image that runs one, and dollar signs is shown as written."
    nb = open_notebook([SETUP])
    nb.run(0)
    nb.page.locator(".widget-text input").fill("2")
    nb.page.keyboard.press("Enter")
    nb.until(lambda: "window.evil = 1" in grey(nb).replace("\xa0", " "))
    assert green(nb).replace("\xa0", " ") == "<img src=x onerror='window.evil = 2'> costs $5, not $6<eos>"
    assert nb.page.evaluate("window.evil") is None and not nb.page.query_selector(
        ".widget-html img, .widget-html script"
    )
