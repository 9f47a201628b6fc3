"""What a model makes of examples: their loss and its answers, both from one look at each row."""

import math
import random

import torch
from torch.nn import functional as F

from moondream2.cli import InputError
from moondream2.features import image_embeds
from moondream2.launch import gather, whole_weights
from moondream2.modeling_moondream2 import RoomyCache, to_answer
from moondream2.rows import text_inputs
from moondream2.scoring import is_correct, mean

LEAST_NEW_TOKENS = 64  # that an answer may have, however short those of the data are


def most_new_tokens(datasets, max_text_tokens):
    """The tokens that an answer may have: a quarter more than the longest of the data, if there are positions."""
    longest = max(len(example.answer_ids) for dataset in datasets for example in dataset.examples)
    return min(max(LEAST_NEW_TOKENS, longest + longest // 4), max_text_tokens)


@torch.no_grad()
def evaluate(model, tokenizer, batches, asked=frozenset()):
    """Avg Loss, the mean over all answer tokens of all processes, and {key of an example: Answer}, decoded greedily.

    Args:
        model: its generation_config says how long an answer may become.
        batches: of `lay_out`, this process's part.
        asked: the keys of the examples whose questions are answered.
    Raises:
        InputError: not one picture could be read.
    """
    model.eval()
    losses, tokens, answers = [], 0, {}
    with whole_weights(model), torch.compiler.set_stance("force_eager"):  # what COMPILE has made is for training
        for batch in batches:
            if batch["rows"]:
                loss, texts = evaluate_batch(model, tokenizer, batch, asked)
                losses.append(loss)
                tokens += len(batch["answer_positions"])
                answers |= texts
    losses, tokens = gather(torch.stack(losses).tolist() if losses else []), sum(gather([tokens]))
    if not tokens:
        raise InputError("no picture of the questions that judge the model can be read any more")
    return math.fsum(losses) / tokens, dict(gather(list(answers.items())))


def evaluate_batch(model, tokenizer, batch, asked):
    """A batch's loss, summed over its answer tokens, and the answers to those of its examples that are asked."""
    device = model.get_input_embeddings().weight.device
    examples = [[example.key in asked for example in row] for row in batch["rows"]]
    is_asked = any(map(any, examples))
    embeds = image_embeds(batch["pictures"], model.vision_encoder, device)
    cache = RoomyCache() if is_asked else None
    out = model.text_model(**text_inputs(batch, device), image_embeds=embeds, past_key_values=cache)
    targets = [token for row in batch["rows"] for example in row for token in example.answer_ids]
    loss = F.cross_entropy(out.logits.float(), torch.tensor(targets, device=device), reduction="sum")
    if not is_asked:
        return loss, {}
    rows = {name: tensor.to(device) for name, tensor in batch.items() if torch.is_tensor(tensor)}
    most = rows["prompt_ends"].shape[1]
    wanted = torch.tensor([row + [False] * (most - len(row)) for row in examples], device=device)
    # The pass that gave the loss has also read each prompt: its last token's logits begin the answer.
    begins = torch.searchsorted(rows["answer_positions"], rows["prompt_ends"].clamp(min=0))
    decoded = model.decode(out.logits[begins], rows, cache, tokenizer.eos_token_id, asked=wanted)
    answered = [
        (example.key, to_answer(*answer, tokenizer))
        for row, answers in zip(batch["rows"], decoded, strict=True)
        for example, answer in zip(row, answers, strict=False)
        if example.key in asked
    ]
    return loss, dict(answered)


def draw_questions(examples, most, seed):
    """The keys of at most so many examples, the same ones for a seed."""
    keys = [example.key for example in examples]
    return frozenset(random.Random(seed).sample(keys, min(len(keys), most)))


def accuracy_of(examples, answers):
    """The accuracy of {key: Answer} on those of the examples that were asked; None where none was."""
    return mean(is_correct(answers[each.key].text, each.answers) for each in examples if each.key in answers)
