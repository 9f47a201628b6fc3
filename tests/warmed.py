"""What a process does at its first time only, done: loaded by the server that the tests' children are forked from."""

# ruff: noqa: E402, F401
import gc

gc.disable()  # of what is imported, none need be looked through

from pathlib import Path

import matplotlib.figure  # which a run imports at its end
import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import finetune_moondream  # which knows the model
from moondream2 import report
from tests import child, launched

torch.set_num_threads(1)  # a process with threads should not be forked
tqdm.monitor_interval, interval = 0, tqdm.monitor_interval
for folder in Path(__file__).parent.glob("tiny_moondream2*"):
    model, tokenizer = (each.from_pretrained(folder) for each in (AutoModelForCausalLM, AutoTokenizer))
    model.query(Image.new("RGB", (9, 9)), "", tokenizer=tokenizer, max_new_tokens=2)
report.template()
tqdm.monitor_interval = interval
gc.freeze()
gc.enable()
