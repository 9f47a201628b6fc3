"""The parts that `finetune_moondream.py` calls in a line, each a file named for what it is."""
