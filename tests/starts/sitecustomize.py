"""Run by each interpreter that a test starts: without looking for garbage, imports take two thirds of their time."""

import atexit
import gc

gc.disable()
atexit.register(gc.freeze)  # nor at the end, for a second
