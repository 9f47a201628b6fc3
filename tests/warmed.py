"""What a process does at its first time only, done: loaded by the server that the tests' children are forked from."""

from pathlib import Path

import matplotlib.figure  # noqa: F401, what a run imports at its end
import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import finetune_moondream  # noqa: F401, which knows the model
from moondream2 import report

torch.set_num_threads(1)  # a process with threads should not be forked
tqdm.monitor_interval, interval = 0, tqdm.monitor_interval
for folder in Path(__file__).parent.glob("tiny_moondream2*"):
    model, tokenizer = (each.from_pretrained(folder) for each in (AutoModelForCausalLM, AutoTokenizer))
    model.query(Image.new("RGB", (9, 9)), "", tokenizer=tokenizer, max_new_tokens=2)
report.template()
tqdm.monitor_interval = interval
